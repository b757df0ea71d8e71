"""RLAD: the teacher inside the importance ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.methods.grpo import grpo
from opdkit.objective import (
    Advantage,
    Bounds,
    Estimator,
    Live,
    LogpFact,
    Objective,
    TokenLoss,
    log_ratio,
)


@dataclass(frozen=True)
class TrustRatio(Bounds, TokenLoss):
    """[n]: PPO's clipped loss of pi_s / (pi_student^a pi_teacher^(1 - a)), pi_student before the
    step; the teacher's log-ratio is clamped and has no gradient beyond.
    """

    a: float = 0.5
    clamp: float = 1.0
    takes_region: ClassVar[bool] = True

    def value(self, live: Live) -> Tensor:  # [n]
        moved = log_ratio(live, "student")
        ahead = (live.logp - live.read(LogpFact("teacher"))).clamp(-self.clamp, self.clamp)
        r = (self.a * moved + (1 - self.a) * ahead).exp()
        return self.bounded_at(live, r, live.pick(self.credit))


def rlad(
    a: float = 0.5,
    clamp: float = 1.0,
    advantage: str = "std",
    reference_kl: float = 0.0,
    reference_estimator: str = "k3",
) -> Objective:
    """RLAD: follow the teacher only where the reward agrees; GRPO whose ratio is to a mixture of
    the old student and the teacher.

        log r_t = a log(pi_s / pi_s before the step) + (1 - a) clamp(log(pi_s/pi_t), -c, c)
        max(-A r, -A clip(r, 1 - low, 1 + high)),   mean over all tokens   [+ reference_kl * k3]

    a = 1 is GRPO and loads no teacher, a = 0 a ratio to the teacher alone. A token that the student
    already favours over the teacher is not pushed up, one it disfavours is not pushed down. Where A
    = 0 (all right or all wrong) nothing is learnt, unlike `kdrl`.

    Source: arXiv 2602.22495; c = 1 is from a replica. Not offered: the widely seen snippet that
    adds a teacher term to A, another method.

    Arguments:
        a: share of the old student in what the ratio is to, in [0, 1]; the teacher has the rest.
            Default: the paper's.
        clamp: c: bound on the teacher's log-ratio, in nats, above 0; beyond it has no gradient.
            Default: a replica's.
        advantage: how a reward becomes an advantage: "std" (less the mean of its prompt's rollouts,
            over their standard deviation), "mean" (without the division), "rloo" (less the mean of
            the others). Default: that of GRPO.
        reference_kl: weight of a penalty that keeps the student near the reference, per token; at
            least 0, 0 loads no reference. Default: ours, off as in `grpo`.
        reference_estimator: form of that penalty: "k3", "k2" or "k3+" (see `grpo`). Default:
            GRPO's.
    """
    if not 0 <= a <= 1:
        raise ValueError(
            f"a={a} must lie in [0, 1]: 1 is a ratio to the old student alone, 0 to the teacher "
            "alone"
        )
    if a == 1:
        return grpo(advantage, "dapo", reference_kl, reference_estimator)
    objective = Objective(TrustRatio(Advantage(advantage), 0.2, 0.2, a=a, clamp=clamp))
    return (
        objective + Estimator(reference_estimator, "reference") * reference_kl
        if reference_kl
        else objective
    )
