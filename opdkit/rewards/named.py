"""Several rewards of each response, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from opdkit.base.errors import UserError, nearest
from opdkit.types import DataRow


@dataclass(frozen=True)
class Named:
    """Rewards by name, and what each counts in their sum; 1 where nothing is said.

    The first decides what is correct, of the responses that it applies to; the next of the others.
    """

    rewards: Mapping[str, Any]
    weights: Mapping[str, float]
    pairwise: ClassVar[bool] = False  # each response has a number of its own (see `against`)

    def __post_init__(self) -> None:
        if not self.rewards or not all(self.rewards.values()):
            raise UserError(
                "rewards by name must each say what they are: reward: {accuracy: math, format: "
                "file.py:function}"
            )
        for name, weight in self.weights.items():
            if name not in self.rewards:
                raise UserError(
                    f"reward_weights.{name} weighs no reward of the run"
                    f"{nearest(name, list(self.rewards))}"
                )
            if not math.isfinite(weight):
                raise UserError(f"reward_weights.{name}={weight} must be a finite number")

    def check(self) -> None:
        """Refuse a machine on which one of them cannot score."""
        for reward in self.rewards.values():
            if hasattr(reward, "check"):
                reward.check()

    def check_row(self, row: DataRow) -> None:
        """Refuse a row to which none of them applies."""
        if any(applies(reward, row) for reward in self.rewards.values()):
            return
        raise UserError(
            f"none of the rewards {', '.join(self.rewards)} can score it: give it the columns of "
            "one of them, or leave it out"
        )


def applies(reward: Any, row: DataRow) -> bool:
    """Whether a reward has nothing against a row (see `rows.check_rows`)."""
    if not hasattr(reward, "check_row"):
        return True
    try:
        reward.check_row(row)
    except UserError:
        return False
    return True


def refuse_idle(reward: Any, rows: Sequence[DataRow]) -> None:
    """Refuses rewards by name of which one applies to no row."""
    for name, one in reward.rewards.items() if isinstance(reward, Named) else ():
        if rows and not any(applies(one, row) for row in rows):
            try:
                one.check_row(rows[0])
            except UserError as error:
                raise UserError(
                    f"the reward {name!r} applies to no row of the data: row {rows[0]['id']!r}: "
                    f"{error}"
                ) from error
