"""APO: right and wrong answers treated unlike: less KL on the right ones of hard prompts, more
pressure on wrong ones that ramble.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.arguments import not_negative
from opdkit.objective import (
    Advantage,
    Batch,
    Clipped,
    Correct,
    Estimator,
    GroupMean,
    Objective,
    Signal,
)

LONGER = 1.00001  # about one per cent for a thousand tokens


@dataclass(frozen=True)
class Pull(Signal):
    """[B, 1]: how much of the KL a rollout has: 1 - exp(-e c) where its advantage is positive, c
    the share of right ones among its prompt's rollouts; 1 elsewhere, and where all are right or
    none.
    """

    advantage: Signal  # [B, 1]

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        share = GroupMean(Correct())(batch)
        some = (self.advantage(batch) > 0) & (share > 0) & (share < 1)
        return torch.where(some, -torch.expm1(-math.e * share), 1.0)


@dataclass(frozen=True)
class Length(Signal):
    """[B, 1]: how many tokens of a rollout the student wrote."""

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        return batch.mask.sum(1, keepdim=True).to(batch.dtype)


@dataclass(frozen=True)
class TooLong(Signal):
    """[B, 1]: 2 - 1.00001^-n for a wrong rollout of n tokens more than the right ones of its prompt
    have in the mean; 1 for others, and where none is right.
    """

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        share = GroupMean(Correct())(batch)
        usual = GroupMean(Length() * Correct())(batch) / torch.where(share > 0, share, 1.0)
        more = (Length()(batch) - usual).clamp_min(0)
        wrong = ~Correct()(batch) & (share > 0)
        return torch.where(wrong, 1 - torch.expm1(-more * math.log(LONGER)), 1.0)


def apo(beta: float = 1e-3, dads: bool = True, stcr: bool = True) -> Objective:
    """APO: on a hard prompt the right answers are held to the reference less than on an easy one;
    wrong answers that are longer than the right ones are pushed down more.

        max(-s A r, -s A clip(r)),   mean over all tokens
        + beta k k3,   mean over each rollout's tokens, then over rollouts
        A = (R - mean) / (std + 1e-6),   r = pi_s / pi_s before the step
        k3 = exp(d) - d - 1,   d = log(pi_ref/pi_s)
        k = 1 - exp(-e c) where A > 0, c the share of right ones among a prompt's rollouts;
            1 where A <= 0, and at c = 0 or 1                                       (dads)
        s = 2 - 1.00001^-n for a wrong rollout n tokens longer than the mean of the prompt's right
            ones; 1 for others, and where none is right                             (stcr)

    k keeps general skills where a prompt is easy, and lets go where it is hard. s has the sign of
    no advantage changed; it is about one per cent for a thousand tokens, and below 2. Lengths count
    trained tokens. Right is what the reward calls correct, whatever else it pays.

    Source: arXiv 2506.21655 and its code. Departure: std + 1e-6, as everywhere (there 1e-9). Not
    offered: exp(-e (1 - c)), which stands in the code as a comment; its order of the data.

    Arguments:
        beta: weight of the KL to the reference, at least 0; 0 loads no reference. Default: the
            paper's.
        dads: whether right answers of hard prompts have less of it; otherwise all have the same.
            Default: the paper's.
        stcr: whether wrong answers that are too long weigh more. Default: the paper's.
    """
    not_negative(beta=(beta, "it is the weight of the KL to the reference"))
    advantage = Advantage()
    objective = Objective(Clipped(advantage * TooLong() if stcr else advantage, 0.2, 0.2))
    if beta:
        penalty = Estimator("k3", "reference") * (Pull(advantage) * beta if dads else beta)
        objective += penalty.per("rows")
    return objective
