"""What a reward needs of its rows, asked before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opdkit.base.errors import UserError
from opdkit.base.own_code import own_code
from opdkit.types import DataRow


def check_rows(reward: Any, rows: Sequence[DataRow]) -> None:
    """Refuses the first row that a reward could not score.

    A reward says so by a method `check_row(row)`, which raises for such a row; one without it takes
    every row.
    """
    check: Callable[[DataRow], object] | None = getattr(reward, "check_row", None)
    if check is None:
        return
    for row in rows:
        with own_code(f"row {row['id']!r} cannot be scored"):
            try:
                check(row)
            except UserError as error:
                raise UserError(f"row {row['id']!r}: {error}") from error
