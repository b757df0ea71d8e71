"""SCOPE: likelihood on correct rollouts, distillation on wrong ones."""

from __future__ import annotations

from opdkit.methods.opd import Clip
from opdkit.objective import (
    Correct,
    GroupShare,
    Likelihood,
    Logp,
    LogRatio,
    Objective,
    RowMean,
    policy_gradient,
)


def scope(
    tau: float = 1.0,
    student_power: float = 1,
    teacher_power: float = -1,
    clip: Clip = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Objective:
    """SCOPE: reinforce what the student got right, distil what it got wrong, each weighted inside
    its prompt.

        correct:  -log pi_s(y_t) * share of PPL_s^(student_power / tau),  mean over the tokens of
        correct rollouts
        wrong:    -ratio r_t * share of PPL_t^(teacher_power / tau),      mean over all trained
        tokens

    PPL = exp(-mean log-prob) of a rollout; a share is taken over the rollouts of one prompt in the
    same set, times their number, so its mean is 1. The defaults favour correct answers the student
    found hard and wrong ones the teacher can read.

    Source: arXiv 2604.10688. Shares sum to 1 in the paper and have mean 1 in its code (here). The
    code's launch scripts favour EASY correct answers, against the paper: that is
    `student_power=-1`; its config-file default also has `teacher_power=1`.
    """
    if tau <= 0:
        raise ValueError(f"tau={tau} must be positive: it is the temperature of the shares")
    hard = GroupShare(RowMean(Logp("student")) * (-student_power / tau), among=Correct())
    read = GroupShare(RowMean(Logp("teacher")) * (-teacher_power / tau), among=~Correct())
    return (Likelihood() * Correct() * hard).per("own") + (
        policy_gradient(LogRatio("teacher", "student"), clip, dual_clip, rollout_cap)
        * ~Correct()
        * read
    )
