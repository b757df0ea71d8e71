"""Signals as formulas: arithmetic, comparison and logic over the facts of a step, printed as one
writes them.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, Union

import torch
from torch import Tensor

from opdkit.objective.batch import Batch

Number = Union[int, float]  # noqa: UP007 (evaluated at run time)
# signals that were found to make a token's value of its own row's numbers alone
SEPARATE: set[Signal] = set()


class Signal(ABC):
    """An expression over the facts of a step: `signal(batch)` is [B, T], [B, 1] or [1, 1], and so
    is `value`, which it computes once per step.

    A subclass is a frozen dataclass with `value(batch)`; it reads other signals by calling them on
    the batch.
    """

    @abstractmethod
    def value(self, batch: Batch) -> Tensor: ...  # [B, T], [B, 1] or [1, 1]

    def __call__(self, batch: Batch) -> Tensor:
        if self not in batch.signals:
            outer, batch.partial = batch.partial, False
            with torch.no_grad():
                value = self.value(batch)
                if batch.partial:
                    if batch.mine is not None and self not in SEPARATE:
                        batch.refuse_joined(value, self.value)
                        if batch.divided:  # else nothing was found out
                            SEPARATE.add(self)
                    value = batch.shared(value)
                batch.signals[self] = value
            batch.partial = outer
        return batch.signals[self]

    @property
    def marks(self) -> frozenset[str]:
        """The marks that it reads, by itself or in its parts."""
        held = (x for v in vars(self).values() for x in (v if isinstance(v, tuple) else (v,)))
        return frozenset(mark for x in held if isinstance(x, Signal) for mark in x.marks)

    # replaced by dataclass; keeps the abstract class hashable for type checkers
    def __hash__(self) -> int:
        return id(self)

    def __add__(self, other: Signal | Number) -> Signal:
        return Operation("+", (self, lift(other)))

    def __radd__(self, other: Number) -> Signal:
        return Operation("+", (lift(other), self))

    def __sub__(self, other: Signal | Number) -> Signal:
        return Operation("-", (self, lift(other)))

    def __rsub__(self, other: Number) -> Signal:
        return Operation("-", (lift(other), self))

    def __mul__(self, other: Signal | Number) -> Signal:
        if not isinstance(other, (Signal, int, float)):
            return NotImplemented  # a loss or a term: it knows how to take a signal
        return Operation("*", (self, lift(other)))

    def __rmul__(self, other: Number) -> Signal:
        return Operation("*", (lift(other), self))

    def __truediv__(self, other: Signal | Number) -> Signal:
        return Operation("/", (self, lift(other)))

    def __rtruediv__(self, other: Number) -> Signal:
        return Operation("/", (lift(other), self))

    def __neg__(self) -> Signal:
        return Operation("negative", (self,))

    def __abs__(self) -> Signal:
        return Operation("abs", (self,))

    def __invert__(self) -> Signal:
        return Operation("not", (self,))

    def __and__(self, other: Signal) -> Signal:
        return Operation("and", (self, other))

    def __or__(self, other: Signal) -> Signal:
        return Operation("or", (self, other))

    def __gt__(self, other: Signal | Number) -> Signal:
        return Operation(">", (self, lift(other)))

    def __ge__(self, other: Signal | Number) -> Signal:
        return Operation(">=", (self, lift(other)))

    def __lt__(self, other: Signal | Number) -> Signal:
        return Operation("<", (self, lift(other)))

    def __le__(self, other: Signal | Number) -> Signal:
        return Operation("<=", (self, lift(other)))

    def __str__(self) -> str:
        return spell(self)


@dataclass(frozen=True)
class Const(Signal):
    """A number."""

    number: Number

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        return torch.full((1, 1), float(self.number), dtype=batch.dtype, device=batch.device)

    def __str__(self) -> str:
        return f"{self.number:g}"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a * b of values [B, T], [B, 1] or [1, 1] with 0 * inf = 0: a token that one factor excludes
    is out, whatever the other says of it.
    """
    a, b = torch.broadcast_tensors(a, b)
    return torch.where(
        (a == 0) | (b == 0), torch.zeros((), dtype=torch.result_type(a, b), device=a.device), a * b
    )


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": product,
    "/": operator.truediv,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.inv,
    "negative": operator.neg,
    "abs": operator.abs,
}

LOGIC = ("and", "or", "not")
# how tightly each binds, for printing
RANK = {"+": 2, "-": 2, "*": 3, "/": 3, "negative": 4, "not": 4, "and": 1, "or": 1}


@dataclass(frozen=True)
class Operation(Signal):
    """Arithmetic, comparison or logic of signals, element by element."""

    name: str
    of: tuple[Signal, ...]

    def value(self, batch: Batch) -> Tensor:  # [B, T], [B, 1] or [1, 1]
        values = [signal(batch) for signal in self.of]
        if self.name not in LOGIC:  # true counts as 1
            values = [v.to(batch.dtype) if v.dtype == torch.bool else v for v in values]
        return OPERATIONS[self.name](*values)

    def __str__(self) -> str:
        if self.name == "abs":
            return f"|{self.of[0]}|"
        rank = RANK.get(self.name, 0)
        left = [self.inside(s, rank) for s in self.of[:-1]]
        right = self.inside(self.of[-1], rank + (self.name in ("-", "/", "negative", "not")))
        sign = {"and": "&", "or": "|", "not": "~", "negative": "-"}.get(self.name, self.name)
        return f"{left[0]} {sign} {right}" if left else sign + right

    @staticmethod
    def inside(part: Signal, rank: int) -> str:
        loose = isinstance(part, Operation) and part.name != "abs" and RANK.get(part.name, 0) < rank
        return f"({part})" if loose else str(part)


def lift(value: Signal | Number) -> Signal:
    """A number as a signal."""
    if isinstance(value, Signal):
        return value
    if isinstance(value, (int, float)):
        return Const(value)
    raise TypeError(f"{value!r} is neither a signal nor a number")


def factors(signal: Signal) -> tuple[Signal, ...]:
    """What a product multiplies, numbers left out."""
    if isinstance(signal, Operation) and signal.name == "*":
        return tuple(f for part in signal.of for f in factors(part))
    return () if isinstance(signal, Const) else (signal,)


def spell(part: Any) -> str:
    """`Name(value, field=value)`: a part as one would write it, fields at their default
    left out.
    """
    words = []
    for f in fields(part):
        value = getattr(part, f.name)
        default = (
            f.default
            if f.default is not MISSING
            else f.default_factory()
            if f.default_factory is not MISSING
            else MISSING
        )
        if default is not MISSING and value == default:
            continue
        text = str(value)
        words.append(text if default is MISSING else f"{f.name}={text}")
    return f"{type(part).__name__}({', '.join(words)})"
