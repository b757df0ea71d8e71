"""Values as JSON: of exact built-in types, rebuilt from their parts, so that nothing of a program's
own comes along.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
from collections.abc import Callable
from typing import Any

Keep = Callable[[Any], Any]  # of a value that stays at home: what stands for it
Find = Callable[[str, int], Any]  # the value that something stands for

# Exact types that are rebuilt from a list: how they are taken apart, and made.
PARTS: dict[type, tuple[Callable[[Any], list[Any]], Callable[..., Any]]] = {
    list: (list, lambda *v: list(v)),
    tuple: (list, lambda *v: v),
    set: (list, lambda *v: set(v)),
    frozenset: (list, lambda *v: frozenset(v)),
    dict: (lambda d: [list(d), list(d.values())], lambda k, v: dict(zip(k, v))),
    collections.OrderedDict: (
        lambda d: [list(d), list(d.values())],
        lambda k, v: collections.OrderedDict(zip(k, v)),
    ),
    collections.Counter: (lambda d: [dict(d)], collections.Counter),
    collections.deque: (lambda d: [list(d), d.maxlen], collections.deque),
    range: (lambda r: [r.start, r.stop, r.step], range),
    complex: (lambda c: [c.real, c.imag], complex),
    bytes: (lambda b: [b.decode("latin-1")], lambda s: s.encode("latin-1")),
    bytearray: (lambda b: [b.decode("latin-1")], lambda s: bytearray(s.encode("latin-1"))),
    fractions.Fraction: (lambda f: [f.numerator, f.denominator], fractions.Fraction),
    decimal.Decimal: (lambda d: [str(d)], decimal.Decimal),
    datetime.date: (lambda d: [d.year, d.month, d.day], datetime.date),
    datetime.time: (lambda t: [t.isoformat()], datetime.time.fromisoformat),
    datetime.datetime: (lambda d: [d.isoformat()], datetime.datetime.fromisoformat),
    datetime.timedelta: (lambda d: [d.days, d.seconds, d.microseconds], datetime.timedelta),
}
# What a class derived from one of these has of it.
BASES: list[tuple[type, Callable[[Any], Any]]] = [
    (int, int.__int__),
    (float, float.__float__),
    (str, str.__str__),
    (complex, complex.__complex__),
    (bytes, bytes),
    (bytearray, bytearray),
    (tuple, tuple),
    (dict, dict),
    (list, list),
    (set, set),
    (frozenset, frozenset),
]
NAMED = {kind.__name__: make for kind, (_, make) in PARTS.items()}
CLASSES = {value for value in vars(builtins).values() if type(value) is type}
MUTABLE = (
    list,
    dict,
    set,
    bytearray,
    collections.OrderedDict,
    collections.Counter,
    collections.deque,
)


def pack(value: Any, keep: Keep) -> Any:
    """As JSON: what JSON has is itself, all else is a list that begins with its type's name."""
    kind = type(value)
    if kind in (type(None), bool, float, str):
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else ["int", hex(value)]
    if kind is type and value in CLASSES:
        return ["type", value.__name__]
    if kind in PARTS:
        return [kind.__name__, *(pack(part, keep) for part in PARTS[kind][0](value))]
    if kind.__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "biufcUS":
        return (
            pack(value.item(), keep)
            if value.ndim == 0
            else ["ndarray", value.dtype.str, pack(value.tolist(), keep)]
        )
    if isinstance(value, int | float | str | tuple) or kind.__module__ == "collections":
        return pack(plain(value), keep)  # an IntEnum, a named tuple, a defaultdict
    return keep(value)


def plain(value: Any) -> Any:
    """The built-in part of an instance of a derived class; the value itself where it has none."""
    return next((take(value) for base, take in BASES if isinstance(value, base)), value)


def unpack(packed: Any, find: Find) -> Any:
    """The value that `pack` took apart; anything odd raises."""
    if type(packed) is not list:
        return packed if packed == packed else find("nan", 0)
    name: str = packed[0]
    parts = packed[1:]
    if name == "int":
        return int(parts[0], 16)
    if name == "type":
        return builtin_class(parts[0])
    if name == "ndarray":
        import numpy

        return numpy.array(unpack(parts[1], find), dtype=numpy.dtype(parts[0]))
    if name in NAMED:
        made = NAMED[name](*(unpack(part, find) for part in parts))
        if name == "Decimal" and made.is_nan():
            find("nan", 0)
        return made
    return find(name, int(parts[0]))


def builtin_class(name: str) -> type:
    found = vars(builtins).get(name)
    if not isinstance(found, type):
        raise ValueError(f"there is no built-in class {name!r}")
    return found
