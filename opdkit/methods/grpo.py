"""GRPO and its loss variants: the reward-driven objective that the mixed methods build on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.methods.arguments import one_of
from opdkit.objective import (
    Advantage,
    Batch,
    Bounds,
    Clipped,
    Estimator,
    Live,
    LogpFact,
    Objective,
    RolloutLoss,
    TokenLoss,
    ratio,
)
from opdkit.objective.losses import MOST_APART
from opdkit.objective.maths import row_mean


@dataclass(frozen=True)
class SequenceClipped(Bounds, RolloutLoss):
    """GSPO, [R]: PPO's clipped loss of one ratio per rollout, the geometric mean of its tokens'.

    The credit is one number per rollout; a region sees the geometric mean of its tokens'
    probabilities.
    """

    takes_region: ClassVar[bool] = True

    def value(self, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch) -> Tensor:  # [R]
        before = batch.read(LogpFact("student"))[rows]
        r = row_mean(logp - before, mask).clamp(-MOST_APART, MOST_APART).exp()
        means = row_mean(logp, mask), row_mean(before, mask)
        return self.bounded(r, self.credit(batch)[rows], *means)[:, 0]


@dataclass(frozen=True)
class ClippedWeight(Bounds, TokenLoss):
    """CISPO, [n]: -clip(ratio, 1 - low, 1 + high) * credit * log pi_s, the clipped ratio without
    gradient: no token loses its own.
    """

    takes_dual: ClassVar[bool] = False
    takes_region: ClassVar[bool] = True

    def value(self, live: Live) -> Tensor:  # [n]
        r, credit = ratio(live, "student"), live.pick(self.credit)
        if self.region is not None:  # of which the gradient is that of a ratio times log pi_s
            return self.bounded_at(live, r, credit)
        return -r.detach().clamp(1 - self.low, 1 + self.high) * credit * live.logp


def grpo(
    advantage: str = "std",
    loss: str = "grpo",
    reference_kl: float = 0.0,
    reference_estimator: str = "k3",
    max_completion_length: int | None = None,
) -> Objective:
    """GRPO: the reward of a rollout, less the mean of its prompt's rollouts, credits each of its
    tokens.

        A = (R - mean) / (std + 1e-6),   r_t = pi_s / pi_s before the step
        PPO's loss max(-A r, -A clip(r, 1 - low, 1 + high)) times pi_s before the step / pi_sampler
        [+ reference_kl * k3]

        grpo     mean over each rollout's tokens, then over rollouts
        dapo     mean over all tokens; the paper has clip=(0.2, 0.28)
                 (its sampling and overlong rules: `train.collect.filters`)
        dr_grpo  sum over tokens / (rollouts * max_completion_length);
                 Dr. GRPO also has advantage="mean"
        gspo     one ratio per rollout, exp(mean log r_t); the paper has clip=(3e-4, 4e-4)
        cispo    -clip(r_t) A log pi_s, clip without gradient, mean over all tokens;
                 clip=(1, 4) is the paper's upper cap only, here at 5

    k3 = exp(d) - d - 1, d = log(pi_ref/pi_s), is the usual penalty, but its gradient is that of
    KL(reference || student); `reference_estimator` "k2" or "k3+" (value of k3) has that of
    KL(student || reference).

    Source: arXiv 2402.03300 (GRPO), 2503.14476 (DAPO), 2503.20783 (Dr. GRPO), 2507.18071 (GSPO),
    2506.13585 (CISPO). Departures: the penalty is off by default, as is now usual; std is the
    sample one (verl; TRL adds 1e-4); verl's dr_grpo lacks the number of rollouts.

    Arguments:
        advantage: how a reward becomes an advantage: "std" (less the mean of its prompt's rollouts,
            over their standard deviation), "mean" (without the division), "rloo" (less the mean of
            the others). Default: GRPO's.
        loss: which variant: "grpo", "dapo", "dr_grpo", "gspo" or "cispo". Default: GRPO's own.
        reference_kl: weight of a penalty that keeps the student near the reference, per token; at
            least 0, 0 loads no reference. Default: off, as is now usual; DeepSeekMath has 0.04.
        reference_estimator: form of that penalty: "k3", "k2" or "k3+". Default: GRPO's.
        max_completion_length: L of loss="dr_grpo", in tokens, at least 1; None: the run's own, its
            sampling.max_completion_length, and 512 where there is no run. Default: the run's.
    """
    over: dict[str, str | int] = {
        "grpo": "rows",
        "dapo": "tokens",
        "dr_grpo": "limit" if max_completion_length is None else max_completion_length,
        "gspo": "row_sums",
        "cispo": "tokens",
    }
    one_of(loss=(loss, over))
    form = {"gspo": SequenceClipped, "cispo": ClippedWeight}.get(loss, Clipped)
    objective = Objective(form(Advantage(advantage), 0.2, 0.2).per(over[loss]))
    if reference_kl:
        penalty = Estimator(reference_estimator, "reference") * reference_kl
        objective += penalty.per("rows" if loss == "gspo" else over[loss])
    return objective
