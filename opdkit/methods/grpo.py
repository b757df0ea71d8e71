"""GRPO and its loss variants: the reward-driven objective that the mixed methods build on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.methods.opd import Clip
from opdkit.objective import (
    Advantage,
    Batch,
    Bounds,
    Ceiling,
    Estimator,
    Exp,
    Live,
    LogpFact,
    LogRatio,
    Objective,
    RolloutLoss,
    RowMean,
    Signal,
    TokenLoss,
    against,
    clipped,
    policy_gradient,
    ratio,
)
from opdkit.objective.maths import row_mean


@dataclass(frozen=True)
class SequenceClipped(Bounds, RolloutLoss):
    """GSPO: PPO's clipped loss of one ratio per rollout, the geometric mean of its token ratios.

    The credit is one number per rollout.
    """

    base: str = "sampler"

    def value(self, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        whole = row_mean(logp - batch.read(LogpFact(self.base))[rows], mask).exp()
        return clipped(whole, self.credit(batch)[rows], self.low, self.high, self.dual)[:, 0]


@dataclass(frozen=True)
class ClippedWeight(TokenLoss):
    """CISPO: -clip(ratio, 1 - low, 1 + high) * credit * log pi_s, the clipped ratio without
    gradient: no token loses its own.
    """

    credit: Signal
    low: float = 0.2
    high: float = 0.2
    base: str = "sampler"
    name: ClassVar[str] = "policy_gradient"

    def value(self, live: Live) -> Tensor:
        weight = ratio(live, self.base).detach().clamp(1 - self.low, 1 + self.high)
        return -weight * live.pick(self.credit) * live.logp


def grpo(
    advantage: str = "std",
    clip: Clip = (0.2, 0.2),
    loss: str = "grpo",
    reference_kl: float = 0.0,
    reference_estimator: str = "k3",
    max_completion_length: int = 512,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Objective:
    """GRPO: the reward of a rollout, less the mean of its prompt's rollouts, credits each of its
    tokens.

        A = (R - mean) / (std + 1e-6),  r_t = pi_s/pi_sampler,  PPO's loss max(-A r, -A clip(r, 1 -
        low, 1 + high))  [+ reference_kl * k3]
        grpo    mean over each rollout's tokens, then over rollouts
        dapo    mean over all tokens; the paper has clip=(0.2, 0.28) (its sampling and overlong
        rules: `train.collect.filters`)
        dr_grpo sum over tokens / (rollouts * max_completion_length); Dr. GRPO also has
        advantage="mean"
        gspo    one ratio per rollout, exp(mean log r_t); the paper has clip=(3e-4, 4e-4)
        cispo   -clip(r_t) A log pi_s, clip without gradient, mean over all tokens; clip=(1, 4) is
        the paper's upper cap only, here at 5

    `advantage` "mean" leaves out the division, "rloo" takes the mean of the others.
    `max_completion_length` is the run's own: it scales dr_grpo only. k3 = exp(d) - d - 1, d =
    log(pi_ref/pi_s), is the usual penalty, but its gradient is that of KL(reference || student);
    `reference_estimator` "k2" or "k3+" (value of k3) has that of KL(student || reference).

    Source: arXiv 2402.03300 (GRPO), 2503.14476 (DAPO), 2503.20783 (Dr. GRPO), 2507.18071 (GSPO),
    2506.13585 (CISPO). Departures: the penalty is off by default, as is now usual; std is the
    sample one (verl; TRL adds 1e-4); verl's dr_grpo lacks the number of rollouts.
    """
    over: dict[str, str | int] = {
        "grpo": "rows",
        "dapo": "tokens",
        "dr_grpo": max_completion_length,
        "gspo": "row_sums",
        "cispo": "tokens",
    }
    if loss not in over:
        raise ValueError(f"loss={loss!r} must be one of {', '.join(over)}")
    credit, (low, high), (base, weight) = (
        Advantage(advantage),
        clip or (math.inf, math.inf),
        against(rollout_cap),
    )
    if loss == "gspo":
        whole = Exp(RowMean(LogRatio("student", "sampler")))
        term = SequenceClipped(credit, low, high, dual_clip, base) * (
            1 if rollout_cap is None else Ceiling(whole, rollout_cap)
        )
    elif loss == "cispo":
        if dual_clip is not None:
            raise ValueError(
                "dual_clip bounds PPO's clipped loss; cispo bounds the ratio itself: use clip"
            )
        term = ClippedWeight(credit, low, high, base) * weight
    else:
        term = policy_gradient(credit, clip, dual_clip, rollout_cap)
    objective = Objective(term.per(over[loss]))
    if reference_kl:
        penalty = Estimator(reference_estimator, "reference") * reference_kl
        objective += penalty.per("rows" if loss == "gspo" else over[loss])
    return objective
