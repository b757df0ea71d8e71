"""KDRL: distillation and reinforcement learning on the same rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.opd import Clip
from opdkit.objective import (
    Advantage,
    Batch,
    Correct,
    Divergence,
    Estimator,
    GroupMean,
    LogRatio,
    MeanOne,
    Objective,
    Signal,
    policy_gradient,
)


@dataclass(frozen=True)
class Linear(Signal):
    """[1, 1]: from `start` at step 0 of the run in a straight line to `end` at step `steps`, and
    `end` from there on.
    """

    start: float
    end: float
    steps: int

    def value(self, batch: Batch) -> Tensor:
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

    def value(self, batch: Batch) -> Tensor:
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
    clip: Clip = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Objective:
    """KDRL: GRPO, which has no signal where a whole group fails, plus a KL to the teacher on the
    same rollouts.

        -ratio A  +  beta_n * estimator of KL(pi_s || pi_t),  mean over all tokens

    beta_n falls in a straight line from `beta` to `beta_min` in `steps` steps of the run and stays
    there. k2 = r_t^2 / 2 has the gradient of KL(pi_s || pi_t), k3 that of KL(pi_t || pi_s); "topk"
    is the reverse KL over the teacher's top `k`, both renormalised; "k1_credit" adds beta_n r_t to
    A inside the clipped loss: k2's gradient on fresh rollouts, clipped elsewhere.

    `mask` "response" keeps the KL on wrong rollouts only, "group" on prompts that no rollout
    solved; its mean is over the kept tokens, with `masked_mean` "all" over all. `exclude_tokens`:
    ids without KL, for a teacher whose end-of-sequence token is another one.

    Source: arXiv 2506.02208, whose GRPO has clip=(0.2, 0.2); a constant weight (its 2e-3) is beta =
    beta_min. Departure: the mean over kept tokens is a replica's (arXiv 2609.04108). Not offered:
    k1 backpropagated, whose gradient does not see the teacher.
    """
    if mask not in (None, "response", "group"):
        raise ValueError(f"mask={mask!r} must be 'response', 'group' or None")
    if masked_mean not in ("kept", "all"):
        raise ValueError(f"masked_mean={masked_mean!r} must be 'kept' or 'all'")
    if estimator not in ("k2", "k1_credit", "k3", "topk"):
        raise ValueError(f"estimator={estimator!r} must be one of k2, k1_credit, k3, topk")
    reward, gap, layer = (
        Advantage(advantage),
        LogRatio("teacher", "student"),
        (clip, dual_clip, rollout_cap),
    )
    if beta == 0:  # GRPO: no teacher is loaded
        return Objective(policy_gradient(reward, *layer))
    keep: Signal | None = None
    if mask is not None:
        keep = ~Correct() if mask == "response" else GroupMean(Correct()) <= 0
    if exclude_tokens:
        keep = ~TokenIn(exclude_tokens) if keep is None else keep & ~TokenIn(exclude_tokens)
    weight: Signal = Linear(beta, min(beta, beta_min), steps)
    # the mean over kept tokens, written over all: each counts for those left out as well
    if keep is not None:
        weight = weight * (MeanOne(keep) if masked_mean == "kept" else keep)
    if estimator == "k1_credit":
        return Objective(policy_gradient(reward + weight * gap, *layer))
    distance = (
        Divergence("reverse_kl", k, "teacher", "renormalise")
        if estimator == "topk"
        else Estimator(estimator)
    )
    return policy_gradient(reward, *layer) + distance * weight
