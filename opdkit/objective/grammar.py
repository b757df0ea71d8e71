"""The grammar: an objective is a sum of terms, each a loss times signals, over a denominator.

    loss = sum over terms of  sum_positions loss(live student) * signal * signal ...  /  denominator
    of the term

Signals are expressions over the facts of a step (no gradient), written like arithmetic. A loss is
the only thing that touches the live student. Everything here is a frozen dataclass: hashable,
comparable, printed as its formula.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import reduce
from typing import Any, ClassVar, Union

import torch
from torch import Tensor

from opdkit.objective.batch import Batch, Live
from opdkit.objective.plan import StepPlan, plan
from opdkit.types import AUTHORS, MARK_OF

Number = Union[int, float]  # noqa: UP007 (evaluated at run time)


# ------------------------------------------------------------------------------------------ signals


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
            with torch.no_grad():
                batch.signals[self] = self.value(batch)
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


def _product(a: Tensor, b: Tensor) -> Tensor:
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
    "*": _product,
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
        left = [self._inside(s, rank) for s in self.of[:-1]]
        right = self._inside(self.of[-1], rank + (self.name in ("-", "/", "negative", "not")))
        sign = {"and": "&", "or": "|", "not": "~", "negative": "-"}.get(self.name, self.name)
        return f"{left[0]} {sign} {right}" if left else sign + right

    @staticmethod
    def _inside(part: Signal, rank: int) -> str:
        loose = isinstance(part, Operation) and part.name != "abs" and RANK.get(part.name, 0) < rank
        return f"({part})" if loose else str(part)


def lift(value: Signal | Number) -> Signal:
    """A number as a signal."""
    if isinstance(value, Signal):
        return value
    if isinstance(value, (int, float)):
        return Const(value)
    raise TypeError(f"{value!r} is neither a signal nor a number")


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


# ------------------------------------------------------------------------------------------- losses


class Loss(ABC):
    """What a term minimises. Subclasses are frozen dataclasses."""

    name: ClassVar[str] = ""  # in logs and reports; the class's own name where empty
    usual: ClassVar[str] = "tokens"  # what a term divides by where nothing is said
    over_rollouts: ClassVar[bool] = False

    def __mul__(self, weight: Signal | Number) -> Term:
        return Term(self) * weight

    __rmul__ = __mul__

    def __add__(self, other: Loss | Term | Objective) -> Objective:
        return Objective(self) + other

    def per(self, denominator: str | int) -> Term:
        """This loss, unweighted, over another denominator."""
        return Term(self).per(denominator)

    def of(self, *authors: str) -> Term:
        """This loss, unweighted, of the tokens that these wrote (see `Term`)."""
        return Term(self).of(*authors)

    @property
    def outer(self) -> Signal:
        """A weight that is the loss's own, such as that of a sampler which is not the trainer."""
        return Const(1)

    def defined(self, batch: Batch) -> Tensor | None:
        """[B, T] or [B, 1] bool: where there is such a loss at all; elsewhere its weight is zero.

        None: everywhere. A policy gradient (a loss with a credit) is one of the tokens that the
        student drew: how probable others were to it says nothing of a choice.
        """
        return None if credit_of(self) is None else batch.mask

    def joined(self, batch: Batch) -> Tensor | None:
        """[B, T] bool: tokens that go into the same chunk as the one before, for a loss that reads
        back (`live.back`). None: no token.
        """
        return None

    def __str__(self) -> str:
        return spell(self)


class TokenLoss(Loss):
    """A number to minimise at each selected position."""

    @abstractmethod
    def value(self, live: Live) -> Tensor:
        """[n], differentiable in what it reads from `live` itself; `live.pick` and `live.read`
        carry no gradient.
        """


class RolloutLoss(Loss):
    """A number to minimise for each rollout, any function of the log-probs of the optimiser step:
    of its own, of the pair or of the group that it is in.

    Its slope d loss / d log pi_s is taken once per optimiser step, over all of its rollouts; what
    is then learnt is linear, and how the step is cut into micro-batches cannot change it.
    """

    usual: ClassVar[str] = "row_sums"
    over_rollouts: ClassVar[bool] = True

    @abstractmethod
    def value(self, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        """[R] from the live log-probs [R, T] of the R rollouts of the step that have tokens; `mask`
        [R, T] says where, `rows` [R] which they are in the batch (`batch.group[rows]`, a signal
        of [B, 1] as `signal(batch)[rows]`). A rollout whose weight is 0 is there as well.
        """


# -------------------------------------------------------------------------------------------- terms

DENOMINATORS = ("tokens", "own", "rows", "own_rows", "row_sums")


@dataclass(frozen=True)
class Term:
    """loss * weight * by * by ... / denominator, over the tokens that `authors` wrote.

    weight: the signals that say which of these tokens the term selects, and how much they count.
    by: what the whole objective is multiplied by from outside, such as another method's weight.
    denominator: "tokens" all of these tokens of the optimiser step; "own" those that `weight`
    selects; "rows" mean over each rollout's tokens, then over rollouts; "own_rows" the same over
    those of them that `weight` selects; "row_sums" sum over tokens, mean over rollouts; a number L:
    rollouts * L. Default: "tokens", of a loss over rollouts "row_sums".
    authors: who wrote the tokens that the loss is about, and which are counted: "student",
    "guide", "data", "environment". Default: the student, those whose marks ("guided", "given",
    "tool") the weight names, and who else writes for the method that the term is in, as its
    curriculum says.
    """

    loss: Loss
    weight: Signal = field(default_factory=lambda: Const(1))
    denominator: str | int = ""
    authors: tuple[str, ...] = ()
    by: tuple[Signal, ...] = ()

    def __post_init__(self) -> None:
        if self.denominator == "":
            object.__setattr__(self, "denominator", self.loss.usual)
        if not (
            self.denominator in DENOMINATORS
            or (isinstance(self.denominator, int) and self.denominator > 0)
        ):
            raise ValueError(
                f"denominator {self.denominator!r} must be one of {', '.join(DENOMINATORS)} or a "
                "positive length"
            )
        if not set(self.authors) <= set(AUTHORS):
            raise ValueError(
                f"a loss of {self.authors!r}: tokens are written by {', '.join(AUTHORS)}"
            )

    def __mul__(self, weight: Signal | Number) -> Term:
        first = self.weight == Const(1)
        return replace(self, weight=lift(weight) if first else self.weight * weight)

    __rmul__ = __mul__

    def __add__(self, other: Loss | Term | Objective) -> Objective:
        return Objective(self) + other

    def per(self, denominator: str | int) -> Term:
        return replace(self, denominator=denominator)

    def of(self, *authors: str) -> Term:
        """This term, over the tokens that these wrote."""
        return replace(self, authors=tuple(authors))

    def times(self, weight: Signal) -> Term:
        """This term times a signal from outside, which it does not count as its selection."""
        if self.denominator in ("own", "own_rows"):
            return replace(self, by=(*self.by, weight))
        return self * weight

    @property
    def whose(self) -> tuple[str, ...]:
        """The authors, as said or by default."""
        if self.authors:
            return self.authors
        named = self.weight.marks
        return ("student", *(author for author, mark in MARK_OF.items() if mark in named))

    @property
    def weights(self) -> Signal:
        """All that the loss is multiplied by."""
        every = [self.weight, *self.by]
        return reduce(operator.mul, every[1:] if self.by and every[0] == Const(1) else every)

    def chosen(self, batch: Batch) -> Tensor:
        """[B, T]: the term's own weight, zero where the loss is not defined."""
        weight = self.weight(batch).expand(batch.shape).to(batch.dtype)
        defined = self.loss.defined(batch)
        return weight if defined is None else torch.where(defined, weight, 0.0)

    def weighed(self, batch: Batch, chosen: Tensor) -> Tensor:
        """[B, T]: its own weight [B, T] with what it is multiplied by from outside, and the loss
        from within.
        """
        more = (by(batch).to(batch.dtype) for by in (*self.by, self.loss.outer))
        return reduce(_product, more, chosen)

    def count(self, mask: Tensor, chosen: Tensor) -> Tensor:
        """[] or [B, 1]: what the weighted sum is divided by, from the term's tokens [B, T] and its
        own weight [B, T]; at least one, so that nothing trained is a zero.
        """
        lengths = mask.sum(1, keepdim=True)
        rows = (lengths > 0).sum()
        if self.denominator == "tokens":
            count = lengths.sum()
        elif self.denominator == "own":
            count = (chosen != 0).sum()
        elif self.denominator == "rows":
            count = lengths.clamp_min(1) * rows
        elif self.denominator == "own_rows":
            count = (chosen != 0).sum(1, keepdim=True).clamp_min(1) * rows
        elif self.denominator == "row_sums":
            count = rows
        else:
            count = rows * int(self.denominator)
        return count.clamp_min(1).to(chosen.dtype)

    def __str__(self) -> str:
        weights = self.weights
        weight = "" if weights == Const(1) else f" * {Operation._inside(weights, RANK['*'])}"
        per = "" if self.denominator == self.loss.usual else f" per {self.denominator}"
        of = "" if self.authors in ((), ("student",)) else f" of {' and '.join(self.authors)}"
        return f"{self.loss}{weight}{per}{of}"


@dataclass(frozen=True, init=False)
class Objective:
    """A sum of terms; what a training step minimises."""

    terms: tuple[Term, ...]

    def __init__(self, *parts: Loss | Term | Objective):
        terms: list[Term] = []
        for part in parts:
            if isinstance(part, Objective):
                terms.extend(part.terms)
            elif isinstance(part, (Loss, Term)):
                terms.append(part if isinstance(part, Term) else Term(part))
            else:
                raise TypeError(
                    f"an objective is a sum of losses and terms, not {type(part).__name__}"
                )
        object.__setattr__(self, "terms", tuple(terms))

    def __add__(self, other: Loss | Term | Objective) -> Objective:
        return Objective(self, other)

    def by_default_of(self, authors: tuple[str, ...]) -> Objective:
        """Every term that does not say whose tokens it is about, also over those of `authors`."""
        every = [dict.fromkeys((*term.whose, *authors)) for term in self.terms]
        return Objective(*(t if t.authors else t.of(*a) for t, a in zip(self.terms, every)))

    def __mul__(self, weight: Signal | Number) -> Objective:
        """Every term times a signal or number; what a term selects and counts stays as it is."""
        return Objective(*(term.times(lift(weight)) for term in self.terms))

    __rmul__ = __mul__

    @property
    def names(self) -> tuple[str, ...]:
        """One name per term, unique: its loss, numbered where a loss comes twice."""
        base = [term.loss.name or type(term.loss).__name__ for term in self.terms]
        return tuple(
            n if base.count(n) == 1 else f"{n}_{base[: i + 1].count(n)}" for i, n in enumerate(base)
        )

    def plan(self, batch: Batch, rows: Tensor | None = None) -> StepPlan:
        """What one optimiser step on `rows` [R] (default all) does: see `plan.plan`."""
        return plan(dict(zip(self.names, self.terms)), batch, rows)

    def __str__(self) -> str:
        return "\n  + ".join(str(term) for term in self.terms)


def credit_of(loss: Loss) -> Signal | None:
    """What a loss credits each sampled token with, for losses that push on the sampled token."""
    return getattr(loss, "credit", None)
