"""Losses over pairs: of two responses to a prompt one is preferred, and its implicit reward, the
slope of a divergence from a reference, is to be the higher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from opdkit.objective.batch import Batch
from opdkit.objective.divergences import Kind, ReverseKL
from opdkit.objective.facts import LogpFact
from opdkit.objective.grammar import RolloutLoss
from opdkit.objective.maths import straight


@dataclass(frozen=True)
class LogU(ReverseKL):
    """KL(student || reference) whose slope is log u alone, without the constant 1, which no
    difference of two sees: what is left is DPO to the bit.
    """

    def slope(self, l: Tensor) -> Tensor:  # [...]
        return l


@dataclass(frozen=True)
class PairLoss(RolloutLoss):
    """[R]: -log sigmoid(beta f'(u_w) - beta f'(u_l)) of its pairs, their mean, log u the sum over
    tokens of log pi_s - log pi_reference. arXiv 2309.16240.

    The pairs of a group are all (w, l) of which w is right and l is not; each rollout carries the
    mean of those it is in, so that one pair to a group gives the mean over pairs.

    kind: whose `slope` is f'. least: a log u below it counts as it, and keeps its gradient, so that
    no exponential is too large. apart: rollouts with this mark are in no pair.
    """

    kind: Kind = LogU()
    beta: float = 0.1
    least: float = -math.inf
    apart: str = ""
    reference: str = "reference"
    name: ClassVar[str] = "pairs"
    usual: ClassVar[str] = "own_row_sums"

    @property
    def bounded(self) -> bool:
        return self.least > -math.inf

    def better(self, batch: Batch) -> Tensor:
        """[B, B] bool: whether the one is preferred to the other."""
        there = batch.trained.any(1)
        if self.apart:
            there = there & ~batch.mark(self.apart).any(1)
        right, group = batch.correct.bool(), batch.group
        return (
            (group[:, None] == group) & (there & right)[:, None] & (there & ~right)
        )  # their groups are small beside the step, and a bool of each two is not

    def defined(self, batch: Batch) -> Tensor:
        """[B, 1] bool: the rollouts that are in a pair."""
        better = self.better(batch)
        return (better.any(1) | better.any(0))[:, None]

    def worth(self, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        """[R]: f'(u) of rollouts `rows` [R] whose tokens `mask` [R, T] have log-probs [R, T]: what
        they are worth implicitly, over beta.
        """
        apart = logp - batch.read(LogpFact(self.reference))[rows]
        l = torch.where(mask, apart, 0.0).sum(1)
        return self.kind.slope(
            l if self.least == -math.inf else straight(l.clamp_min(self.least), l)
        )

    def value(self, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch) -> Tensor:  # [R]
        worth = self.beta * self.worth(logp, mask, rows, batch)
        better = self.better(batch)[rows][:, rows]
        each = torch.where(better, -logsigmoid(worth[:, None] - worth), 0.0)
        return (each.sum(1) + each.sum(0)) / (better.sum(1) + better.sum(0)).clamp_min(1)

    def metrics(self, batch: Batch, mask: Tensor) -> dict[str, Tensor]:
        """Mean implicit rewards of both sides, their difference, and how often it has the right
        sign, [] each, over pairs of which both have tokens in `mask`.
        """
        rows = (self.defined(batch)[:, 0] & mask.any(1)).nonzero()[:, 0]
        mask = mask[rows]
        worth = self.beta * self.worth(batch.read(LogpFact("live"))[rows], mask, rows, batch)
        better = self.better(batch)[rows][:, rows]
        w, l = better.nonzero(as_tuple=True)
        if not len(w):
            return {}
        return {
            "pairs/chosen": worth[w].mean(),
            "pairs/rejected": worth[l].mean(),
            "pairs/margin": (worth[w] - worth[l]).mean(),
            "pairs/accuracy": (worth[w] > worth[l]).to(worth.dtype).mean(),
        }
