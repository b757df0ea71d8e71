"""CORD: the student with a stronger context teaches the one with a weaker, early and where they
disagree most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.method import Method
from opdkit.methods.tip import Highest
from opdkit.objective import (
    Advantage,
    Batch,
    Const,
    Divergence,
    Gap,
    PolicyGradient,
    Signal,
)


@dataclass(frozen=True)
class Falling(Signal):
    """[B, T]: from `first` at a rollout's first trained token in a straight line to 1 at its last;
    `first` where there is one only.
    """

    first: float

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        mask = batch.mask
        before = (mask.cumsum(1) - 1).to(batch.dtype)
        steps = (mask.sum(1, keepdim=True) - 1).clamp_min(1)
        return torch.where(mask, self.first - (self.first - 1) * before / steps, 0.0)


def cord(alpha: float = 2.0, beta: float = 2.0, k: int = 20) -> Method:
    """CORD: the same model reasons better from one context (text) than from another (speech); the
    better pass teaches the other on its own rollouts, most at early tokens and where they disagree.

        w_t KL(pi_s || pi_t) over the whole vocabulary,   sum over tokens, mean over rollouts
        w_t = (alpha among the k tokens of a rollout with the largest KL, else 1)
              * (from beta at the first trained token in a straight line to 1 at the last)
        + policy gradient of A = R - mean of a prompt's rollouts,   sum over tokens, mean over
          rollouts

    KL in the weight is that before the step; of equal ones the earlier counts as larger. The mean
    of the falling weight is (1 + beta) / 2, so beta also changes the size of the loss. The teacher
    is the student itself, as it is before each step, in a stronger context: by default the view
    `solution`; any other is `teacher.view=...`. The reward is the paper's verdict of a judge
    against the answer that the stronger context gives: 0 or 1.

    Source: arXiv 2601.16547 (equations 2 to 10); no public code. Ours: the teacher's weights are
    the current ones (not said), the ratio of the sequence part is not clipped (not said), positions
    count trained tokens. Not offered: the mean over tokens in place of the sum; audio.

    Arguments:
        alpha: weight of the k tokens with the largest divergence, at least 0; 1 is none. Default:
            the paper's; 2.5 was too sharp.
        beta: weight of a rollout's first token, at least 0; 1 is none. Default: the paper's.
        k: how many tokens of a rollout have the weight alpha, at least 0; where it has no more, all
            of them. Default: the paper's.
    """
    if min(alpha, beta, k) < 0:
        raise ValueError(
            f"alpha={alpha}, beta={beta}, k={k} must be at least 0: two weights and a number of "
            "tokens"
        )
    weight: Signal = Const(1)
    if alpha != 1:
        largest = Highest(Gap("reverse_kl"), 0.0, Const(1), least=k)
        weight = 1 + (alpha - 1) * largest
    if beta != 1:
        weight = Falling(beta) if alpha == 1 else weight * Falling(beta)
    return Method(
        (Divergence("reverse_kl") * weight).per("row_sums")
        + PolicyGradient(Advantage("mean")).per("row_sums"),
        models={"teacher": {"kind": "self", "weights": "live", "view": "solution"}},
    )
