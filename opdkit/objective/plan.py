"""What one optimiser step will do, before any backward: weights, counts, and the slopes of losses
over whole rollouts.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdkit.objective.batch import Batch
from opdkit.objective.facts import LogpFact

if TYPE_CHECKING:
    from opdkit.objective.grammar import Term


@dataclass(frozen=True)
class PlannedTerm:
    """A term with its numbers for one optimiser step."""

    name: str
    term: Term
    mask: Tensor  # [B, T]: the tokens of the step that the term is about
    weight: Tensor  # [B, T], zero where the term does not look
    denominator: Tensor  # [] or [B, 1]

    @property
    def scale(self) -> Tensor:
        """[B, T]: what a position's loss is multiplied by."""
        return self.weight / self.denominator


@dataclass(frozen=True)
class PlannedRollouts(PlannedTerm):
    """A term over whole rollouts: once its slope is taken it is a sum over tokens, of which any
    part can be learnt by itself.
    """

    slope: Tensor  # [B, T]: d term / d log pi_s of each token
    values: Tensor  # [B, T]: what each rollout adds to the loss, at the first of its tokens
    # parameters [...] beside the student that the loss computed with, and d term / d each
    owned: tuple[tuple[Tensor, Tensor], ...] = ()

    def owned_at(self, positions: Tensor) -> Tensor | float:
        """[] of which the gradient in what stands beside the student is the term's, once: at the
        first position that the term looks at, 0 at flat positions [n] without it.
        """
        if not self.owned or int(self.weight.flatten().nonzero()[0]) not in positions:
            return 0.0
        return torch.stack([(p * slope).sum() for p, slope in self.owned]).sum()


@dataclass(frozen=True)
class StepPlan:
    """What one optimiser step will do, before any backward."""

    batch: Batch
    mask: Tensor  # [B, T]: the tokens of this optimiser step that any term is about
    parts: tuple[PlannedTerm, ...]

    @property
    def selected(self) -> Tensor:
        """[B, T] bool: positions that at least one term looks at, and what is joined to them.

        No other is projected on the vocabulary.
        """
        chosen = reduce(operator.or_, (part.weight != 0 for part in self.parts))
        if self.joined is None:
            return chosen
        # a number for each token and what is joined to it
        together = (~self.joined).flatten().cumsum(0)
        return torch.isin(together, together[chosen.flatten()]).view_as(chosen)

    @cached_property
    def joined(self) -> Tensor | None:
        """[B, T] bool: tokens that go into the same chunk as the one before."""
        every = [part.term.loss.joined(self.batch) for part in self.parts]
        found = [joined for joined in every if joined is not None]
        return reduce(operator.or_, found) if found else None


def plan(terms: Mapping[str, Term], batch: Batch, rows: Tensor | None = None) -> StepPlan:
    """Weights, denominators and slopes of one optimiser step on `rows` [R] (default all): signals
    are those of the whole batch, counts and losses over rollouts those of the rows.
    """
    inside = torch.ones_like(batch.trained)
    if rows is not None:
        inside = torch.zeros_like(inside).index_fill(0, rows, True)
    parts = [_planned(name, term, batch, inside) for name, term in terms.items()]
    return StepPlan(batch, reduce(operator.or_, (part.mask for part in parts)), tuple(parts))


def _planned(name: str, term: Term, batch: Batch, inside: Tensor) -> PlannedTerm:
    """A term at the positions `inside` [B, T]."""
    mask = batch.by(term.whose) & inside
    chosen = torch.where(mask, term.chosen(batch), 0.0)
    weight = term.weighed(batch, chosen)
    term = replace(term, loss=term.loss.ready(weight, batch))
    made = PlannedTerm(name, term, mask, weight, term.count(mask, chosen))
    return _with_slope(made, batch) if term.loss.over_rollouts else made


def _with_slope(planned: PlannedTerm, batch: Batch) -> PlannedRollouts:
    """The term with its slope at the student as it is now."""
    loss: Any = planned.term.loss
    defined = loss.defined(batch)
    mask = planned.mask if defined is None else planned.mask & defined
    rows = mask.any(1).nonzero()[:, 0]
    logp = torch.where(mask, batch.read(LogpFact("live")), 0.0).detach().requires_grad_()
    scale = _one_scale(planned, mask[rows], planned.scale[rows])
    both, owned = torch.zeros_like(logp).expand(2, *logp.shape), list[tuple[Tensor, Tensor]]()
    if bool((scale != 0).any()):

        def found(batch: Batch) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
            return _slopes(loss, scale, logp, mask, rows, batch)

        batch.partial = False
        both, owned = found(batch)
        if batch.partial and batch.mine is not None:  # of the others' tokens numbers are missing
            if owned:
                raise batch.joined
            batch.refuse_joined(both.movedim(0, -1), lambda other: found(other)[0].movedim(0, -1))
    return PlannedRollouts(
        planned.name,
        planned.term,
        planned.mask,
        planned.weight,
        planned.denominator,
        torch.where(mask, both[0], 0.0).detach(),
        both[1].detach(),
        tuple(owned),
    )


def _slopes(
    loss: Any, scale: Tensor, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """[2, B, T]: the slope of a loss over the rollouts `rows` [R] in log-probs [B, T], and what
    each rollout adds to it, at the first of its tokens (mask [B, T]); with the parameters [...]
    beside the student that it computed with, and its slope in each. `scale` [R]: what a rollout's
    loss is multiplied by.
    """
    slope, values = torch.zeros_like(logp), torch.zeros_like(logp)
    owned: list[tuple[Tensor, Tensor]] = []
    with torch.enable_grad():
        each = loss.value(logp[rows], mask[rows], rows, batch)
        each = torch.where(scale != 0, scale * each, 0.0)
    values[rows, mask[rows].long().argmax(1)] = each.detach()
    if each.requires_grad:
        leaves = [logp, *batch.companions.parameters]
        found = torch.autograd.grad(each.sum(), leaves, allow_unused=True)
        slope = slope if found[0] is None else found[0]
        owned = [(p, d) for p, d in zip(leaves[1:], found[1:]) if d is not None]
    return torch.stack((slope, values)), owned


def _one_scale(planned: PlannedTerm, mask: Tensor, scale: Tensor) -> Tensor:
    """[R]: what each rollout's loss is multiplied by, from the scales [R, T] of its tokens (mask
    [R, T]), which must be equal.
    """
    first = scale.gather(1, mask.long().argmax(1, keepdim=True))
    if bool((mask & ((scale - first).abs() > 0)).any()):
        raise ValueError(
            f"{planned.term} weighs the tokens of a rollout differently, but its loss is one "
            "number per rollout: use a signal per rollout, such as RowMean(...)"
        )
    return first[:, 0]


def planned_rollouts(parts: Sequence[PlannedTerm]) -> list[tuple[int, PlannedRollouts]]:
    """The terms over whole rollouts, each with its place among all."""
    return [(i, part) for i, part in enumerate(parts) if isinstance(part, PlannedRollouts)]
