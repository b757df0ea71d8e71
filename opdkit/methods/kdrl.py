"""KDRL: distillation and reinforcement learning on the same rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.arguments import one_of
from opdkit.objective import (
    Advantage,
    Batch,
    Clipped,
    Correct,
    Divergence,
    Estimator,
    GroupMean,
    LogRatio,
    MeanOne,
    Objective,
    Signal,
)


@dataclass(frozen=True)
class Linear(Signal):
    """[1, 1]: from `start` at step 0 of the run in a straight line to `end` at step `steps`, and
    `end` from there on.
    """

    start: float
    end: float
    steps: int

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        share = min(batch.step / self.steps, 1.0) if self.steps > 0 else 1.0
        return torch.full(
            (1, 1),
            self.start + (self.end - self.start) * share,
            dtype=batch.dtype,
            device=batch.device,
        )


@dataclass(frozen=True)
class TokenIn(Signal):
    """[B, T] bool: the sampled token is one of these ids."""

    ids: tuple[int, ...]

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        return torch.isin(
            batch.tokens, torch.tensor(self.ids, dtype=batch.tokens.dtype, device=batch.device)
        )


def kdrl(
    beta: float = 5e-3,
    beta_min: float = 1e-3,
    steps: int = 80,
    estimator: str = "k2",
    mask: str | None = None,
    masked_mean: str = "kept",
    exclude_tokens: tuple[int, ...] = (),
    k: int = 32,
    advantage: str = "std",
) -> Objective:
    """KDRL: GRPO, which has no signal where a whole group fails, plus a KL to the teacher on the
    same rollouts.

        max(-A w, -A clip(w, 1 - low, 1 + high))  +  beta_n * estimator of KL(pi_s || pi_t)
        w = pi_s/pi_sampler,   A = (R - mean) / (std + 1e-6) of a prompt's rollouts
        mean over all tokens

    beta_n falls in a straight line from `beta` to `beta_min` in `steps` steps of the run and stays
    there. k2 = r_t^2 / 2 has the gradient of KL(pi_s || pi_t), k3 that of KL(pi_t || pi_s); "topk"
    is the reverse KL over the teacher's top `k`, both renormalised; "k1_credit" adds beta_n r_t to
    A inside the clipped loss: k2's gradient on fresh rollouts, clipped elsewhere.

    Source: arXiv 2506.02208; a constant weight (its 2e-3) is beta = beta_min. Departure: the mean
    over kept tokens is a replica's (arXiv 2609.04108). Not offered: k1 backpropagated, whose
    gradient does not see the teacher.

    Arguments:
        beta: weight of the teacher's KL at the first step, at least 0; 0 is `grpo(loss=dapo)` and
            loads no teacher. Default: the paper's.
        beta_min: weight from step `steps` on, at least 0; a value above `beta` counts as `beta`.
            Default: the paper's.
        steps: steps of the run in which the weight falls from one to the other, at least 0.
            Default: the paper's (5e-5 per step).
        estimator: of the KL: "k2", "k3", "topk", or "k1_credit" (inside the clipped loss). Default:
            the paper's.
        mask: which rollouts keep the KL: None (all), "response" (wrong ones), "group" (those of
            prompts that no rollout solved). Default: the paper's plain form.
        masked_mean: what a masked KL is a mean over: "kept" tokens or "all". Default: that of a
            replica, arXiv 2609.04108.
        exclude_tokens: ids of tokens without KL, such as an end of sequence that the teacher does
            not have. Default: none.
        k: size of the teacher's top k with estimator="topk", in tokens, at least 1. Default: ours;
            the paper's is not known.
        advantage: how a reward becomes an advantage: "std" (less the mean of its prompt's rollouts,
            over their standard deviation), "mean" (without the division), "rloo" (less the mean of
            the others). Default: the paper's.
    """
    one_of(estimator=(estimator, ("k2", "k1_credit", "k3", "topk")))
    reward, where = Advantage(advantage), masked(mask, masked_mean, exclude_tokens)
    if beta == 0:  # GRPO: no teacher is loaded
        return Objective(Clipped(reward, 0.2, 0.2))
    weight: Signal = Linear(beta, min(beta, beta_min), steps)
    if where is not None:
        weight = weight * where
    if estimator == "k1_credit":
        return Objective(Clipped(reward + weight * LogRatio("teacher", "student"), 0.2, 0.2))
    topk = Divergence("reverse_kl", k, "teacher", "renormalise")
    distance = topk if estimator == "topk" else Estimator(estimator)
    return Clipped(reward, 0.2, 0.2) + distance * weight


def masked(mask: str | None, masked_mean: str, exclude_tokens: tuple[int, ...]) -> Signal | None:
    """[B, T] or [B, 1]: the weight of tokens that keep the teacher's KL, 0 for others; None: all
    keep it.

    The mean over the kept ones is written over all: each counts for those left out as well.
    """
    if masked_mean not in ("kept", "all"):
        raise ValueError(f"masked_mean={masked_mean!r} must be 'kept' or 'all'")
    if mask not in (None, "response", "group"):
        raise ValueError(f"mask={mask!r} must be 'response', 'group' or None")
    keep: Signal | None = None
    if mask is not None:
        keep = ~Correct() if mask == "response" else GroupMean(Correct()) <= 0
    if exclude_tokens:
        keep = ~TokenIn(exclude_tokens) if keep is None else keep & ~TokenIn(exclude_tokens)
    return MeanOne(keep) if keep is not None and masked_mean == "kept" else keep
