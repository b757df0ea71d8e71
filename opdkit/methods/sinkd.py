"""Sinkhorn distillation: the transport of the step's distributions onto the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.methods.arguments import positive
from opdkit.objective import Batch, Divergence, Live, Objective, TokenLoss, uniform
from opdkit.objective.head import chunk_rows, flat_positions, slices
from opdkit.objective.kernels import Vocabulary
from opdkit.objective.kernels.pairwise import distances, pulls


@dataclass(frozen=True)
class Transport(TokenLoss):
    """The share of each token in the Sinkhorn distance between the student's distributions at all
    tokens of an optimiser step and the teacher's: see `sinkd`.

    Its slope is taken once per optimiser step, over all of its tokens; what is then learnt is a sum
    over tokens, of which any part can be learnt by itself.
    """

    temperature: float = 2.0
    eps: float = 0.1
    iterations: int = 20
    items: int = 512
    detach: bool = False
    name: ClassVar[str] = "transport"

    def ready(self, weight: Tensor, batch: Batch) -> TokenLoss:
        """With the plan of each set of tokens at the student as it is now; weight [B, T]."""
        at = flat_positions(weight != 0)
        if len(at) == 0:
            return self
        teacher, student = everywhere(batch, "teacher"), batch.source("live")
        mine = torch.ones_like(weight) if batch.mine is None else batch.mine.to(weight.dtype)
        sets = []
        for part in self.sets(at, batch):
            rows = mine.flatten()[part].nonzero()[:, 0]
            cost = weight.new_zeros(len(part), len(part))
            for i in slices(len(rows), chunk_rows(teacher.vocabulary, batch.device)):
                p = self.soft(student.logits(part[rows[i]]))
                for j in slices(len(part), chunk_rows(teacher.vocabulary, batch.device)):
                    cost[rows[i], j] = distances(p, self.soft(teacher.logits(part[j])))
            cost = cost if batch.whole is None else batch.whole(cost)
            values, slope = self.solved(cost, weight.flatten()[part])
            sets.append(Solved(part, values, slope))
        return Ready(self, teacher, tuple(sets))

    def value(self, live: Live) -> Tensor:  # [n]
        """Of positions that are all there is."""
        weight = torch.zeros_like(live.batch.trained, dtype=live.batch.dtype).flatten()
        return self.ready(
            weight.index_fill(0, live.positions, 1.0).view(live.batch.shape), live.batch
        ).value(live)

    def sets(self, at: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Flat positions [N] in sets of at most `items`: rollout by rollout, in a drawn order."""
        rank = uniform(batch, str(self))[:, 0].sort(stable=True).indices.argsort()
        key = rank[at // batch.shape[1]] * batch.shape[1] + at % batch.shape[1]
        return at[key.argsort()].tensor_split(math.ceil(len(at) / self.items))

    def soft(self, logits: Tensor) -> Tensor:
        """[n, V]: probabilities of logits [n, V] over the temperature."""
        return Vocabulary(logits).logps(self.temperature).exp()

    def solved(self, cost: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[M] sum_j P_ij W_ij and slope [M, M]: of their sum, weighed by `weight` [M], in the cost
        W [M, M], over the weight of the row.
        """
        steps = sinkhorn(cost / self.eps, self.iterations)
        plan = transported(cost / self.eps, *steps[-1])
        slope = weight[:, None] * plan
        if not self.detach:
            slope += through(cost / self.eps, steps, weight[:, None] * cost) / self.eps
        return (plan * cost).sum(1), slope / weight[:, None]


@dataclass(frozen=True, eq=False)
class Solved:
    """A set of tokens that are compared with each other."""

    positions: Tensor  # [M] flat
    values: Tensor  # [M]: what each adds
    slope: Tensor  # [M, M]: d / d W


@dataclass(frozen=True, eq=False)
class Ready(TokenLoss):
    """`Transport` in one optimiser step, once its plans are known."""

    loss: Transport
    teacher: Any  # its source, at the positions of all processes
    sets: tuple[Solved, ...]

    def value(self, live: Live) -> Tensor:  # [n]
        p = live.logps(self.loss.temperature).exp()
        pull, values = torch.zeros_like(p), p.new_zeros(len(p))
        for solved in self.sets:
            here = torch.isin(live.positions, solved.positions).nonzero()[:, 0]
            if len(here) == 0:
                continue
            ranked, order = solved.positions.sort()
            row = order[torch.searchsorted(ranked, live.positions[here])]
            values[here] = solved.values[row].to(p.dtype)
            for j in slices(len(order), chunk_rows(p.shape[-1], p.device)):
                q = self.loss.soft(self.teacher.logits(solved.positions[j])).to(p.dtype)
                slope = solved.slope[row, j].to(p.dtype)
                pull[here] += pulls(p[here].detach(), q, slope)
        return values + ((p - p.detach()) * pull).sum(-1)


def everywhere(batch: Batch, model: str) -> Any:
    """A model's source at the positions of all processes."""
    source = batch.source(model)
    if batch.whole is None:
        return source
    if not hasattr(source, "everywhere"):
        raise UserError(
            f"sinkd compares every token with the {model} at all others, and {model} is put "
            "together from several models, which several processes cannot send each other: use "
            "one model, or one process"
        )
    return source.everywhere(batch.whole, batch.dtype)


def sinkhorn(cost: Tensor, iterations: int) -> list[tuple[Tensor, Tensor]]:
    """exp(-cost) [M, M], its rows and then its columns divided by their sums, so many times: after
    each iteration the logarithms [M], [M] of what rows and columns have been multiplied by.
    """
    across, steps = torch.zeros_like(cost[0]), []
    for _ in range(iterations):
        down = -(across - cost).logsumexp(1)
        across = -(down[:, None] - cost).logsumexp(0)
        steps.append((down, across))
    return steps


def transported(cost: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """[M, M]: exp(-cost) with its rows and columns multiplied by exp of `down`, `across` [M]."""
    return (down[:, None] + across - cost).exp()


def through(cost: Tensor, steps: Sequence[tuple[Tensor, Tensor]], to_plan: Tensor) -> Tensor:
    """[M, M]: the slope in the cost of what has the slope `to_plan` [M, M] in the plan, through
    every iteration.
    """
    moved = to_plan * transported(cost, *steps[-1])
    total, to_down, to_across = -moved, moved.sum(1), moved.sum(0)
    befores = [torch.zeros_like(cost[0]), *(across for _, across in steps[:-1])]
    for (down, across), before in zip(reversed(steps), reversed(befores)):
        columns = transported(cost, down, across) * to_across  # each sums to its own slope
        rows = transported(cost, down, before) * (to_down - columns.sum(1))[:, None]
        total += columns + rows
        to_down, to_across = torch.zeros_like(to_down), -rows.sum(0)
    return total


def sinkd(
    temperature: float = 2.0,
    eps: float = 0.1,
    iterations: int = 20,
    mix: float = 0.0256,
    items: int = 512,
    detach: bool = False,
) -> Objective:
    """SinKD: beside KL at each token, the cost of carrying all of the student's distributions onto
    all of the teacher's, which still says something where the two hardly overlap.

        KL(q_i || p_i)  +  mix sum_j P_ij W_ij,   mean over all trained tokens i
        p_i, q_i: student and teacher at token i, logits over `temperature`
        W_ij = sum_v |p_i(v) - q_j(v)|,   P = exp(-W / eps), `iterations` times divided by the sums
        of its rows, then by those of its columns

    i and j run over the trained tokens of an optimiser step, `items` at most: more are divided into
    equal sets of neighbours, rollout by rollout in a drawn order, each with a P of its own. The sum
    over i is SD, between 0 and 2 N. Nothing in it ties a student's token to the teacher's at the
    same place (the teacher's rows in another order give the same), so that KL has to. The gradient
    goes through W and through every iteration of P; `detach` holds P, the gradient of SD less eps
    times the entropy of P. It is exact for the whole step, whatever its parts, and
    costs `items` V operations for each token; the student is read once before each optimiser
    step.

    Source: arXiv 2402.17110 and its code (classes of a batch); tokens in the place of samples, SD
    over N, and sets are ours. Weights: KL 1, no labels (the code has .8 to 1 and the rest on
    labels, which text of the student does not have), SD 8e-4 of a sum over batches of 16 to 32.
    Departures: one temperature for both parts (the code has 2 to 4 in KL), without a factor T^2;
    not copied is the code of its T0 and GPT-Neo, which takes softmax and sums along time.

    Arguments:
        temperature: divides the logits of both models, above 0. Default: the code's.
        eps: weight of the entropy in the transport, in units of W, above 0; small: each student's
            token goes to its nearest teacher's. Default: the code's.
        iterations: divisions of P by the sums of rows and columns, at least 1. Default: the code's.
        mix: weight of SD / N beside KL, at least 0; 0 is KL alone. Default: the code's 8e-4, times
            its batch of 32.
        items: tokens that are compared with each other, at most; at least 1. Default: ours; the
            code has a batch of 16 to 32.
        detach: whether P is held in the gradient. Default: the code's, off.
    """
    positive(
        temperature=(temperature, "it divides logits"),
        eps=(eps, "it divides the cost of the transport"),
    )
    if iterations < 1 or items < 1 or not 0 <= mix < math.inf:
        raise ValueError(
            f"iterations={iterations} and items={items} must be at least 1, mix={mix} a number of "
            "at least 0: without an iteration P is no plan, and with a negative mix the student is "
            "driven away from the teacher"
        )
    near = Objective(Divergence("forward_kl", temperature=temperature))
    if mix == 0:
        return near
    return near + Transport(temperature, eps, iterations, items, detach) * mix
