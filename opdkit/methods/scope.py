"""SCOPE: likelihood on correct rollouts, distillation on wrong ones."""

from __future__ import annotations

from opdkit.objective import (
    Correct,
    GroupShare,
    Likelihood,
    Logp,
    LogRatio,
    Objective,
    PolicyGradient,
    RowMean,
)


def scope(
    tau: float = 1.0,
    student_power: float = 1,
    teacher_power: float = -1,
) -> Objective:
    """SCOPE: reinforce what the student got right, distil what it got wrong, each weighted inside
    its prompt.

        correct:  -log pi_s(y_t) * share of PPL_s^(student_power / tau)
                  mean over the tokens of correct rollouts
        wrong:    -ratio r_t * share of PPL_t^(teacher_power / tau)
                  mean over all trained tokens

    PPL = exp(-mean log-prob) of a rollout; a share is taken over the rollouts of one prompt in the
    same set, times their number, so its mean is 1. The defaults favour correct answers the student
    found hard and wrong ones the teacher can read.

    Source: arXiv 2604.10688. Shares sum to 1 in the paper and have mean 1 in its code (here). The
    code's launch scripts favour EASY correct answers, against the paper: that is
    `student_power=-1`; its config-file default also has `teacher_power=1`.

    Arguments:
        tau: temperature of the shares, above 0: small ones put all weight on one rollout of a
            prompt, large ones make the weights equal. Default: the paper's.
        student_power: power of the student's perplexity in the weight of correct rollouts: above 0
            favours those it found hard, below 0 easy ones. Default: the paper's; the launch scripts
            have -1.
        teacher_power: power of the teacher's perplexity in the weight of wrong rollouts: below 0
            favours those the teacher can read. Default: the paper's; the code's configuration has
            1.
    """
    if tau <= 0:
        raise ValueError(f"tau={tau} must be positive: it is the temperature of the shares")
    hard = GroupShare(RowMean(Logp("student")) * (-student_power / tau), among=Correct())
    read = GroupShare(RowMean(Logp("teacher")) * (-teacher_power / tau), among=~Correct())
    return (Likelihood() * Correct() * hard).per("own") + (
        PolicyGradient(LogRatio("teacher", "student")) * ~Correct() * read
    )
