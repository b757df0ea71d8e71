"""DMPO: the relative likelihoods of a prompt's responses follow a Boltzmann distribution of their
rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.methods.arguments import not_negative, one_of, positive
from opdkit.objective import (
    Advantage,
    Batch,
    Clipped,
    Logp,
    LogRatio,
    Objective,
    Reward,
    RolloutLoss,
    RowMean,
    Signal,
)
from opdkit.objective.maths import group_index, group_means, group_softmax, row_mean


@dataclass(frozen=True)
class DistributionMatching(RolloutLoss):
    """[R]: (p - q)^2 of each rollout, p the softmax of its score / alpha and q that of its mean
    log-prob, both over the rollouts of its prompt. Their mean is that over prompts of the mean over
    a prompt's rollouts, also where prompts have more or fewer of them.
    """

    score: Signal  # [B, 1]
    alpha: float
    name: ClassVar[str] = "distribution_matching"

    def value(self, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch) -> Tensor:  # [R]
        group, every, phi = batch.group[rows], mask.any(1), row_mean(logp, mask)[:, 0]
        aim = group_softmax(self.score(batch)[rows, 0] / self.alpha, every, group)
        size = group_means(phi.detach(), group)[2]  # a group's shares have its size as their sum
        squares = ((aim - group_softmax(phi, every, group)) / size).square()
        return squares * (len(rows) / group_index(group)[1]) / size


def dmpo(
    lam: float = 2.0, alpha: float = 1 / 15, score: str = "reward", reference: bool = True
) -> Objective:
    """DMPO: GRPO piles its mass on the first good answer; a second term makes the likelihoods of a
    prompt's answers, against each other, follow their rewards, so that all good ones are kept.

        max(-A r, -A clip(r))  +  lam (p - q)^2,   A = (R - mean) / (std + 1e-6),
        p = softmax of R / alpha,   q = softmax of the mean of log pi_s over a rollout's tokens,
        both over a prompt's rollouts;   r = pi_s / pi_s before the step
        first term: mean over each rollout's tokens, then over rollouts; second: mean over a
        prompt's rollouts, then over prompts

    R is the raw reward in p. The second term has neither ratio nor clip, and its gradient over the
    rollouts of a prompt sums to 0: it says how probable they are to each other, the first how
    probable all of them. Where all rewards are equal it still evens out their likelihoods.

    With `score="teacher"` R is the teacher's opinion of the rollout in both terms, the mean of
    log(pi_t/pi_ref) over its tokens, or of log pi_t without the reference: a listwise distillation
    that needs no reward.

    Source: arXiv 2605.19461, as a public implementation and two summaries quote it; scores of a
    teacher are ours. Departures: std + 1e-6 and the sample std, as everywhere.

    Arguments:
        lam: weight of the second term, at least 0; 0 is `grpo`. Default: that of the
            implementation, said to be the paper's.
        alpha: temperature of the target p, above 0, in units of the score: towards 0 p is uniform
            over the best, at infinity over all. Default: that of the implementation, said to be the
            paper's, for rewards of about 0 to 1.
        score: what R is: "reward", or "teacher". Default: the paper's.
        reference: whether the teacher's score is measured against the reference; False: its mean
            log-prob alone. Default: ours, with it, so that what is usual text earns nothing.
    """
    one_of(score=(score, ("reward", "teacher")))
    positive(alpha=(alpha, "it is the temperature of the target distribution"))
    not_negative(lam=(lam, "it is the weight of the second term"))
    of: Signal = Reward()
    if score == "teacher":
        of = RowMean(LogRatio("teacher", "reference") if reference else Logp("teacher"))
    objective = Objective(Clipped(Advantage(of=of), 0.2, 0.2).per("rows"))
    return objective + DistributionMatching(of, alpha) * lam if lam else objective
