"""Skill-SD: GRPO, with the student that knows a skill as a teacher of the one that does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.methods.grpo import grpo
from opdkit.methods.method import Method
from opdkit.objective import Live, LogpFact, TokenLoss, ratio
from opdkit.objective.maths import k3


@dataclass(frozen=True)
class WeightedK3(TokenLoss):
    """w k3, w = pi_s / pi_sampler with its gradient, k3 = exp(-l) - 1 + l, l = log(pi_s / pi_t):
    value and expected gradient of KL(pi_s || pi_t), whatever the tokens were drawn from.

    d (w k3) = w l d log pi_s; without the gradient of w it would be that of KL(pi_t || pi_s).
    """

    teacher: str = "teacher"
    name: ClassVar[str] = "weighted_k3"

    def value(self, live: Live) -> Tensor:  # [n]
        apart = live.logp - live.read(LogpFact(self.teacher))
        return ratio(live, "sampler") * k3(apart)


def skill_sd(lam: float = 1e-3) -> Method:
    """Skill-SD: what the agent's own trajectories have taught is written down as skills; the
    student that reads them teaches the one that does not, beside GRPO.

        GRPO  +  lam w_t k3_t,   w_t = pi_s/pi_sampler with its gradient
        k3_t = exp(-l_t) - 1 + l_t,   l_t = log(pi_s/pi_t)
        GRPO per rollout as `grpo` has it; the rest a mean over all trained tokens

    The teacher is the student itself, as it is before each step, which reads a skill beside the
    prompt (view `skill`); it only scores. Skills are written from finished rollouts (annotator
    `skills`). w k3 has the value and, as w keeps its gradient, the expected gradient of KL(pi_s ||
    pi_t), whatever the tokens were drawn from. Without a skill teacher and student agree, and
    nothing is added. The paper's reward is the share of sub-goals that are reached.

    Source: arXiv 2604.10674 (equations 10 to 14); its code is
    announced. Departure: none is known; the denominator is our reading (the paper's N: valid
    action tokens or rollouts).

    Arguments:
        lam: weight of the teacher's term, at least 0; 0 is `grpo` and loads no teacher. Default:
            the paper's best of 5e-4 to 1e-2.
    """
    if lam < 0:
        raise ValueError(f"lam={lam} must be at least 0: it is the weight of the teacher's term")
    if lam == 0:
        return Method(grpo())
    return Method(
        grpo() + WeightedK3() * lam,
        models={"teacher": {"kind": "self", "weights": "live", "view": "skill"}},
        annotate={"skills": {"kind": "skills"}},
    )
