"""Rows that a caller hands over: texts, dictionaries, a table, a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from opdkit.base.errors import UserError
from opdkit.types import DataRow


def as_rows(data: Any) -> list[DataRow]:
    """Texts or rows as rows; a table (pandas, polars, pyarrow) or a dictionary of columns by its
    rows.

    Splits are refused, since which one is meant is not known, and so is what is no row.
    """
    return [_row(item, index) for index, item in enumerate(_items(data))]


def _items(data: Any) -> Iterable[Any]:
    if hasattr(data, "to_dicts"):  # polars
        return data.to_dicts()
    if hasattr(data, "to_pylist"):  # pyarrow
        return data.to_pylist()
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas
        names = list(map(str, data.columns))
        columns = [data.iloc[:, i].tolist() for i in range(len(names))]
        return [
            {name: _known(value) for name, value in zip(names, values)} for values in zip(*columns)
        ]
    if isinstance(data, Mapping):
        return _by_columns(data)
    if data is None or isinstance(data, bytes) or not isinstance(data, Iterable):
        raise UserError(
            f"the data is {_kind(data)}, which holds no rows: give a list of texts or of "
            "dictionaries, a table, a path or a name on the hub"
        )
    return data


def _known(value: Any) -> Any:
    """A cell: None for what a table marks as missing (NaN, NaT, NA), a list for an array."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    try:
        return value if value == value else None
    except TypeError:  # NA is neither equal nor unequal
        return None


def _by_columns(data: Mapping[Any, Any]) -> list[DataRow]:
    """The rows of a dictionary of columns."""
    values = list(data.values())
    if any(hasattr(v, "column_names") or isinstance(v, Mapping) or _of_rows(v) for v in values):
        raise UserError(
            f"the data holds splits ({', '.join(map(str, data))}), not rows: pass one, for "
            f"example data[{next(iter(data))!r}]"
        )
    lists = [v.tolist() if hasattr(v, "tolist") else v for v in values]
    if not all(isinstance(v, list | tuple) for v in lists):
        raise UserError(
            f"the data is a dictionary ({', '.join(map(str, data))}) whose values are no columns: "
            "a single row belongs into a list, and a column is a list of values"
        )
    if len({len(v) for v in lists}) > 1:
        sizes = ", ".join(f"{name} has {len(v)}" for name, v in zip(data, lists))
        raise UserError(
            f"the columns of the data are of different lengths ({sizes}), so that rows cannot be "
            "told: give each a value for every row"
        )
    return [dict(zip(map(str, data), row)) for row in zip(*lists)]


def _of_rows(value: Any) -> bool:
    """Whether a column is a list of rows: of dictionaries that each hold a prompt, say; messages
    are lists of dictionaries with a role.
    """
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(v, Mapping) and "prompt" in v for v in value)
    )


def _row(item: Any, index: int) -> DataRow:
    if isinstance(item, str):
        return {"prompt": str(item)}
    if isinstance(item, Mapping):
        return dict(item)
    raise UserError(
        f"row {index} must be a text or a dictionary of columns, not {_kind(item)}: give rows such "
        'as {"prompt": "2 + 2?", "answer": "4"}'
    )


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"of type {type(value).__name__}"
