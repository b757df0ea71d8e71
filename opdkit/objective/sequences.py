"""Signals of whole responses: sums over their tokens, and these against others of the group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.objective.batch import Batch
from opdkit.objective.formula import Const, Signal
from opdkit.objective.maths import group_means


@dataclass(frozen=True)
class RowSum(Signal):
    """[B, 1]: sum of a signal over a rollout's trained tokens, such as the log-ratio of a whole
    response.
    """

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        values = self.of(batch).expand(batch.shape).to(batch.dtype)
        return torch.where(batch.mask, values, 0.0).sum(1, keepdim=True)


@dataclass(frozen=True)
class OfOthers(Signal):
    """[B, 1]: a signal [B, 1] less its mean over the other rollouts of the group, of those alone
    for which `among` holds; as it is where there is no other.

    A baseline that does not see the rollout itself: what it takes away is zero on average.
    """

    of: Signal
    among: Signal = Const(1)

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        rows = batch.trained.any(1)
        values = self.of(batch).to(batch.dtype).expand(len(rows), 1)[:, 0]
        beside = rows & self.among(batch).expand(len(rows), 1)[:, 0].bool()
        least, mean, count = group_means(values, 2 * batch.group + beside)
        apart = (values - least - mean) * count / (count - 1).clamp_min(1)
        return torch.where(beside & (count > 1), apart, values)[:, None]
