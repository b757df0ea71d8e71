"""Importance-weighted on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.objective import Batch, LogRatio, MeanOne, Objective, PolicyGradient, Signal


@dataclass(frozen=True)
class SpentBefore(Signal):
    """[B, T]: the share of a row's total |signal| that lies before each token: 0 at its first
    token, rising.
    """

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        size = torch.where(batch.mask, self.of(batch).abs(), 0.0)
        before = size.cumsum(1) - size
        return (before / (size.sum(1, keepdim=True) + 1e-8)).clamp(0, 1)


def iw_opd(
    gamma: float = 0.5,
    mean_one: bool = False,
) -> Objective:
    """IW-OPD: early tokens, still near what the teacher would write, count more than late ones.

        credit r_t = log(pi_t/pi_s),  weight 1 + gamma (1 - sum_{k<t} |r_k| / sum_k |r_k|)
        mean over all trained tokens

    Source: arXiv 2606.22600. The gap is taken from the student before the step, as in the official
    code (TRL recomputes it).

    Arguments:
        gamma: by how much the first token of a rollout counts more than its last, at least 0; 0 is
            `opd`. Default: the paper's.
        mean_one: whether weights are divided by their mean over the step, so that gamma does not
            change the step size. Default: off, as in the paper.
    """
    credit = LogRatio("teacher", "student")
    weight = 1 + gamma * (1 - SpentBefore(credit))
    return Objective(PolicyGradient(credit) * (MeanOne(weight) if mean_one else weight))
