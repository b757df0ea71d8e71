"""Clip-Cov and KL-Cov: the few tokens that make entropy collapse, and no others, are tamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.methods.arguments import shares
from opdkit.objective import (
    Advantage,
    Batch,
    Bounds,
    Live,
    Logp,
    LogRatio,
    Objective,
    PolicyGradient,
    Signal,
    TokenLoss,
    clipped,
    log_ratio,
    ratio,
    uniform,
)
from opdkit.objective.losses import MOST_APART
from opdkit.objective.maths import deviations

ROUNDING = 1e-6  # a covariance that is lb itself stays outside, though it came out a little larger


@dataclass(frozen=True)
class Covariance(Signal):
    """[B, T]: (A - mean A) (log pi - mean log pi) of each token, pi the student as it is now; means
    over the trained tokens of the step. Its own mean is the covariance of the two.
    """

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        credit = self.of(batch).to(batch.dtype).expand(batch.shape)
        now = Logp("live")(batch)
        return deviations(credit, batch.mask) * deviations(now, batch.mask)


@dataclass(frozen=True)
class Largest(Signal):
    """[B, T] bool: the share `ratio` of the trained tokens that have the largest covariance, at
    least one; of equal ones the earlier.
    """

    of: Signal
    ratio: float

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        return largest(Covariance(self.of)(batch), batch.mask, quota(batch, self.ratio))


@dataclass(frozen=True)
class Spared(Signal):
    """[B, T] bool: all tokens but a few, drawn at random of those whose covariance lies between lb
    and ub and which no bound of their loss holds already.
    """

    loss: CovarianceClipped

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        loss, covariance = self.loss, Covariance(self.loss.credit)(batch)
        credit = loss.credit(batch).to(batch.dtype).expand(batch.shape)
        moved = LogRatio("live", "student")(batch).clamp(-MOST_APART, MOST_APART)
        held = clipped(moved.exp(), credit, loss.low, loss.high, loss.dual) != -credit * moved.exp()
        between = (covariance > loss.lb + ROUNDING) & (covariance < loss.ub - ROUNDING)
        among = batch.mask & ~held & between
        draws = uniform(batch, f"{loss}")
        return ~largest(-draws, among, quota(batch, loss.ratio))


@dataclass(frozen=True)
class CovarianceClipped(Bounds, TokenLoss):
    """[n]: PPO's clipped loss, times 0 at the tokens that are not `Spared`."""

    ratio: float = 2e-4
    lb: float = 1.0
    ub: float = 5.0
    takes_region: ClassVar[bool] = True

    @property
    def outer(self) -> Signal:
        return super().outer * Spared(self)

    def value(self, live: Live) -> Tensor:  # [n]
        return self.bounded_at(live, ratio(live, "student"), live.pick(self.credit))


@dataclass(frozen=True)
class Moved(TokenLoss):
    """[n]: |log(pi_s / pi_s before the step)|: no gradient where the two are equal."""

    name: ClassVar[str] = "moved"

    def value(self, live: Live) -> Tensor:  # [n]
        return log_ratio(live, "student").abs()


def quota(batch: Batch, ratio: float) -> int:
    """How many tokens a share of the step's trained ones is, rounded down; at least one."""
    return max(int(ratio * int(batch.mask.sum()) + 1e-9), 1)  # 2e-3 of 1000 are 2, not 1.999...


def largest(values: Tensor, among: Tensor, number: int) -> Tensor:
    """[B, T] bool: the `number` largest of values [B, T] at the positions `among` [B, T], or all of
    these if they are fewer; of equal ones the earlier.
    """
    lowest = torch.where(among, values, -torch.inf).flatten()
    order = lowest.sort(descending=True, stable=True).indices[: min(number, int(among.sum()))]
    return torch.zeros_like(among).flatten().index_fill(0, order, True).view(among.shape)


def clip_cov(ratio: float = 2e-4, lb: float = 1.0, ub: float = 5.0) -> Objective:
    """Clip-Cov: entropy collapses through the few tokens whose probability and advantage are high
    together, or low; some of them are left out of each update.

        c_t = (A - mean A) (log pi_s - mean log pi_s),   r_t = pi_s / pi_s before the step
        max(-A r, -A clip(r, 1 - low, 1 + high)),  0 at N tokens;   mean over all tokens

    N tokens, the share `ratio` of all, at least one, are drawn of those with lb < c_t < ub that PPO
    does not clip already. For a softmax policy the mean of c is, up to a factor, the speed at which
    entropy falls. A = (R - mean) / (std + 1e-6) of a prompt's rollouts. Tokens that are left out
    stay in the mean.

    Means, candidates and draw are of all trained tokens of the step, at the student as it is at
    each optimiser step; a minibatch loses those of the drawn tokens that are in it. Where a mask or
    the smooth form stands in the clip's place, no token counts as clipped.

    Source: arXiv 2505.22617 and its code, in verl as clip_cov. Departure: there both are of a
    micro-batch, so that its size changes them.

    Arguments:
        ratio: share of the trained tokens that an update leaves out, above 0 and at most 1.
            Default: the paper's.
        lb: covariances must be larger than this, in nats times advantage. Default: the paper's.
        ub: covariances must be smaller than this, in nats times advantage; above lb. Default: the
            paper's.
    """
    some(ratio)
    if not lb < ub:
        raise ValueError(f"lb={lb} must be below ub={ub}: no token's covariance is between them")
    return Objective(CovarianceClipped(Advantage(), ratio=ratio, lb=lb, ub=ub))


def kl_cov(ratio: float = 2e-4, beta: float = 1.0) -> Objective:
    """KL-Cov: entropy collapses through the few tokens whose probability and advantage are high
    together, or low; these are held where they were, all others learn without any bound.

        c_t = (A - mean A) (log pi_s - mean log pi_s),   r_t = pi_s / pi_sampler
        -A r_t,   + beta |log(pi_s / pi_s before the step)| at k tokens;   mean over all tokens

    The k tokens with the largest c_t, the share `ratio` of all, at least one, and of equal ones the
    earlier. The first update on a batch is the plain policy gradient: there the student is where it
    was. A and c_t are those of `clip_cov`, of all trained tokens of the step.

    Source: arXiv 2505.22617 and its code, in verl as kl_cov; the paper writes KL(old || new), the
    code |log ratio|. Its code gives the share in percent: 0.2 for a 7B model is ratio=2e-3, which
    verl's default of 2e-4 is for 32B.

    Arguments:
        ratio: share of the trained tokens that are held, above 0 and at most 1. Default: the code's
            for 32B; it has 2e-3 for 7B.
        beta: weight of the penalty that holds them, at least 0; 0 is the policy gradient with a
            ratio and no bound. Default: the code's.
    """
    some(ratio)
    if not beta >= 0:
        raise ValueError(f"beta={beta} must be at least 0: it is the weight of a penalty")
    policy = PolicyGradient(Advantage())
    return policy + Moved() * Largest(Advantage(), ratio) * beta if beta else Objective(policy)


def some(ratio: float) -> None:
    """Refuses a share of no tokens."""
    shares(ratio=(ratio, "it is a share of the trained tokens"))
    if ratio == 0:
        raise ValueError(
            "ratio=0 chooses no tokens, which is grpo(loss=dapo): give a share above 0"
        )
