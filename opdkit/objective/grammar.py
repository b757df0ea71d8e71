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
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.objective.batch import Batch, Live
from opdkit.objective.formula import RANK, Const, Number, Operation, Signal, lift, product, spell
from opdkit.objective.plan import StepPlan, plan
from opdkit.types import AUTHORS, MARK_OF, Sampling

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

    def metrics(self, batch: Batch, mask: Tensor) -> dict[str, Tensor]:
        """What is worth a curve besides its value, [] each, by name, over the tokens `mask` [B, T]
        of a step.
        """
        return {}

    def ready(self, weight: Tensor, batch: Batch) -> Loss:
        """This loss for one optimiser step, asked for before any backward: one whose value at a
        token depends on the step's other tokens finds here what it needs of them. `weight` [B, T]:
        what each token is multiplied by, 0 where the term does not look.
        """
        return self

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
        """[R] from the live log-probs [R, T] of the R rollouts of the step that have tokens, 0
        elsewhere; `mask` [R, T] says where, `rows` [R] which they are in the batch
        (`batch.group[rows]`, a signal of [B, 1] as `signal(batch)[rows]`). A rollout whose weight
        is 0 is there as well.
        """


# -------------------------------------------------------------------------------------------- terms

DENOMINATORS = (
    "tokens",
    "own",
    "rows",
    "own_rows",
    "row_means",
    "row_sums",
    "own_row_sums",
    "limit",
)
OWN = ("own", "own_rows", "own_row_sums")  # those that count what the term selects
LIMIT = Sampling.max_completion_length  # of "limit" where there is no run


@dataclass(frozen=True)
class Term:
    """loss * weight * by * by ... / denominator, over the tokens that `authors` wrote.

    weight: the signals that say which of these tokens the term selects, and how much they count.
    by: what the whole objective is multiplied by from outside, such as another method's weight.
    denominator: "tokens" all of these tokens of the optimiser step; "own" those that `weight`
    selects; "rows" mean over each rollout's tokens, then over rollouts; "own_rows" the same over
    those of them that `weight` selects; "row_means" mean over each rollout's tokens, sum over
    rollouts; "row_sums" sum over tokens, mean over rollouts;
    "own_row_sums" the same over the rollouts of which it selects a token; a number L: rollouts * L;
    "limit" the same with the run's max_completion_length (`algebra.within`). Default: "tokens", of
    a loss over rollouts "row_sums".
    authors: who wrote the tokens that the loss is about, and which are counted: "student", "guide",
    "data", "environment". Default: the student, those whose marks ("guided", "given", "tool") the
    weight names, and who else writes for the method that the term is in, as its curriculum says.
    """

    loss: Loss
    weight: Signal = field(default_factory=lambda: Const(1))
    denominator: str | int = ""
    authors: tuple[str, ...] = ()
    by: tuple[Signal, ...] = ()

    def __post_init__(self) -> None:
        if self.denominator == "":
            object.__setattr__(self, "denominator", self.loss.usual)
        length = isinstance(self.denominator, int) and self.denominator > 0
        if not (length or self.denominator in DENOMINATORS):
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
        if self.denominator in OWN:
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
        return reduce(product, more, chosen)

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
        elif self.denominator == "row_means":
            count = lengths
        elif self.denominator == "row_sums":
            count = rows
        elif self.denominator == "own_row_sums":
            count = (chosen != 0).any(1).sum()
        else:
            count = rows * (LIMIT if self.denominator == "limit" else int(self.denominator))
        return count.clamp_min(1).to(chosen.dtype)

    def __str__(self) -> str:
        weights = self.weights
        weight = "" if weights == Const(1) else f" * {Operation.inside(weights, RANK['*'])}"
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
