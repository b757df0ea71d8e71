"""DGPO: a response's advantage, moved to the tokens where the student has left the reference and is
unsure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.arguments import not_negative, positive
from opdkit.objective import (
    Advantage,
    Batch,
    Clipped,
    Evenness,
    Gap,
    Objective,
    Signal,
)


@dataclass(frozen=True)
class Deviating(Signal):
    """[B, T]: softmax of d h^kappa / tau over each rollout's tokens, times their number: mean 1; d
    a divergence, h the student's entropy over log V.
    """

    distance: Gap
    kappa: float
    tau: float

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        score = self.distance(batch)
        if self.kappa:
            score = score * Evenness("student")(batch) ** self.kappa
        mask, score = batch.mask, torch.where(batch.mask, score / self.tau, -math.inf)
        size = torch.where(mask, (score - score.amax(1, keepdim=True)).exp(), 0.0)
        # where all are equal it is 1 to the bit: the credit is the advantage itself
        return size * (mask.sum(1, keepdim=True) / size.sum(1, keepdim=True).clamp_min(1))


def dgpo(kappa: float = 1.0, tau: float = 0.5, k: int | None = None) -> Objective:
    """DGPO: the advantage of a response goes to those of its tokens where the student has left the
    reference and was unsure; no KL holds it back.

        d_t = 1 - sum_v sqrt(pi_s pi_ref),   h_t = H(pi_s) / log V,   s_t = d_t h_t^kappa
        w_t = T exp(s_t / tau) / sum over the response's T tokens of exp(s / tau)
        max(-A w r, -A w clip(r)),   r = pi_s / pi_s before the step
        A = (R - mean) / (std + 1e-6) of a prompt's rollouts
        mean over each rollout's tokens, then over rollouts

    d is the squared Hellinger distance. w has mean 1 in each response, so credit is moved and
    neither made nor lost; where the student is the reference it is 1, and this is `grpo`. A token
    written without doubt has h = 0: it counts little, however far from the reference it is.

    Source: arXiv 2605.03327, as two public implementations quote it (no official code). Ours: d and
    h are those of the student before the step, for all updates on its rollouts (the paper does not
    say; on the first it is the same). Departure: std + 1e-6 and the sample std, as everywhere.

    Arguments:
        kappa: power of the relative entropy, at least 0; 0 takes it out. Default: the paper's.
        tau: temperature of the softmax over a response's tokens, above 0; infinity gives all the
            weight 1. Default: the paper's, which finds 0.5 to 1 good.
        k: size of the reference's top k, in tokens, at least 1, which with all others as one entry
            stands for its vocabulary: a lower bound of d, for a reference on a server; None: the
            whole vocabulary. Default: the paper's.
    """
    not_negative(kappa=(kappa, "it is the power of the entropy"))
    positive(tau=(tau, "it is the temperature of the weights of a response's tokens"))
    support, rest = ("full", "raw") if k is None else ("teacher", "tail")
    distance = Gap("hellinger2", support, k, rest, teacher="reference")
    return Objective(Clipped(Advantage() * Deviating(distance, kappa, tau), 0.2, 0.2).per("rows"))
