"""MiniLLM: the reverse KL of whole sequences by policy gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.methods.method import Method
from opdkit.objective import (
    Advantage,
    Batch,
    Ceiling,
    Clipped,
    Const,
    Divergence,
    Floor,
    LogpFact,
    LogRatio,
    Objective,
    Signal,
    ToGo,
    maths,
)


@dataclass(frozen=True)
class Whitened(Signal):
    """[B, T]: (of - mean) / sqrt(variance + 1e-8), both over the trained tokens of the step."""

    of: Signal
    # MiniLLM's own; `objective.credits.refuse` keeps it out of other credits
    standardises: ClassVar[bool] = True

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        centred = maths.deviations(self.of(batch).expand(batch.shape), batch.mask)
        return centred / (maths.masked_mean(centred.square(), batch.mask) + 1e-8).sqrt()


@dataclass(frozen=True)
class LogMixture(Signal):
    """[B, T]: log(share pi_a + (1 - share) pi_b) of the sampled token; log pi_b alone where that
    is known to be what tokens were drawn from, the share of a in it.
    """

    a: str
    b: str
    share: float

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        b = batch.read(LogpFact(self.b))
        return b if batch.drawn else maths.mixture(batch.read(LogpFact(self.a)), b, self.share)


def minillm(
    scale: float = 0.5,
    clamp: float = 100.0,
    discount: float = 0.95,
    length_norm: bool = True,
    whiten: bool = True,
    exact: bool = False,
    single_step: float = 1.0,
    teacher_mix: float = 0.0,
    advantage: str | None = None,
) -> Method:
    """MiniLLM: KL(student || teacher) of whole sequences, so that a small student need not cover
    what it cannot represent.

        r_t = clip(log(pi_t/pi_s) / scale, +-clamp)
        R_t = sum_k g^k r_{t+k} / (trained tokens from t on),   credit A = R whitened
        w max(-A r, -A clip(r, 1 - low, 1 + high))  +  single_step * KL(pi_s || pi_t)
        r = pi_s / pi_old,  w = pi_old / (a pi_t + (1 - a) pi_sampler),  pi_old: pi_s before the
        step

    g = discount, a = teacher_mix; both over all trained tokens. The second term is the exact
    gradient of r_t itself. With `teacher_mix` tokens are drawn from a pi_t + (1 - a) pi_sampler,
    the teacher decoding beside the student; w is at most 1/(1 - a) on fresh rollouts.

    Source: arXiv 2306.08543 and its code. Departures: a = 0 (paper 0.2); w outside the clip;
    statistics without the padding. Not offered: the pre-training term on a text corpus. TRL's
    MiniLLM is scale=1, discount=0, length_norm=False, whiten=False, advantage="std".

    Arguments:
        scale: divides the log-ratio before it is clamped; above 0. Default: the code's.
        clamp: largest |log-ratio / scale|, above 0. Default: its script's.
        discount: g: factor per token of later log-ratios, in [0, 1]. Default: the code's.
        length_norm: whether the return is divided by the number of tokens it sums. Default: the
            code's.
        whiten: whether the return is centred and divided by its standard deviation over the step.
            Default: the code's.
        exact: whether r_t is left out of its own return, as in the paper's decomposition. Default:
            off, as in the code.
        single_step: weight of the exact KL at each prefix, at least 0. Default: the code's.
        teacher_mix: a: share of the teacher in what tokens are drawn from, in [0, 1]. Default:
            ours, so that no teacher is needed while decoding; the paper's is 0.2.
        advantage: adds that of the reward: "std", "mean" or "rloo" (see `grpo`); None: no reward is
            read. Default: the paper's, which has no reward.
    """
    if not 0 <= teacher_mix <= 1:
        raise ValueError(
            f"teacher_mix={teacher_mix} must lie in [0, 1]: the share of the teacher in what the "
            "rollouts were drawn from"
        )
    own = Floor(Ceiling(LogRatio("teacher", "student") / scale, clamp), -clamp)
    credit = returns(own, discount, length_norm, exact)
    if whiten:
        credit = Whitened(credit)
    if advantage is not None:
        credit = credit + Advantage(advantage)
    base = LogMixture("teacher", "sampler", teacher_mix) if teacher_mix else "sampler"
    objective = Objective(Clipped(credit, 0.2, 0.2, base=base))
    if single_step:
        objective += Divergence("reverse_kl") * single_step
    return Method(objective, teacher_mix=teacher_mix)


def returns(own: Signal, discount: float, length_norm: bool, exact: bool) -> Signal:
    """[B, T]: the discounted sum of a signal from each token on, `exact` without the token's own;
    `length_norm` divides it by the number of tokens.
    """
    total: Signal = ToGo(own, discount) - own if exact else ToGo(own, discount)
    length = ToGo(Const(1))
    return total / Floor(length - 1 if exact else length, 1) if length_norm else total
