"""JSON that gives back what was put in: tuples, sets, dates, numbers of other kinds, and keys that
are no text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from typing import Any

# {mark: plain value} stands for what JSON has no form for, and how it is made again
MADE: dict[str, Callable[[Any], Any]] = {
    "@tuple": tuple,
    "@set": set,
    "@frozenset": frozenset,
    "@dict": dict,
    "@datetime": datetime.fromisoformat,
    "@date": date.fromisoformat,
    "@decimal": Decimal,
    "@bytes": bytes.fromhex,
}


def dumps(value: Any, other: Callable[[Any], Any] = str, **settings: Any) -> str:
    """A value as JSON, for `loads`. What plain JSON can say is written as plain JSON; half of a
    surrogate pair, which has no UTF-8, makes it ASCII.

    Arguments:
        other: what is written of anything that has no form here.
        settings: of `json.dumps`.
    """
    marked = _marked(value, other)
    text = json.dumps(marked, ensure_ascii=False, **settings)
    return text if _encodes(text) else json.dumps(marked, **settings)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def loads(text: str) -> Any:
    """What `dumps` was given."""
    return json.loads(text, object_hook=_made)


def _marked(value: Any, other: Callable[[Any], Any]) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        inner = [(_marked(k, other), _marked(v, other)) for k, v in value.items()]
        plain = all(isinstance(k, str) for k in value) and not (
            len(value) == 1 and next(iter(value)) in MADE
        )
        return dict(inner) if plain else {"@dict": inner}
    if isinstance(value, list):
        return [_marked(v, other) for v in value]
    if isinstance(value, tuple):
        return {"@tuple": [_marked(v, other) for v in value]}
    if isinstance(value, set | frozenset):
        return {f"@{type(value).__name__}": [_marked(v, other) for v in sorted(value, key=repr)]}
    if isinstance(value, date):  # also a datetime
        return {"@datetime" if isinstance(value, datetime) else "@date": value.isoformat()}
    if isinstance(value, Decimal):
        return {"@decimal": str(value)}
    if isinstance(value, bytes):
        return {"@bytes": value.hex()}
    if hasattr(value, "tolist"):  # numbers and arrays of NumPy
        return _marked(value.tolist(), other)
    return other(value)


def _made(found: dict[str, Any]) -> Any:
    if len(found) == 1:
        (mark,) = found
        if mark in MADE:
            return MADE[mark](found[mark])
    return found
