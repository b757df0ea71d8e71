"""MiniLLM: the reverse KL of whole sequences by policy gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.methods.method import Method
from opdkit.methods.opd import Clip
from opdkit.objective import (
    Advantage,
    Batch,
    Ceiling,
    Const,
    Divergence,
    Floor,
    LogpFact,
    LogRatio,
    Objective,
    Signal,
    ToGo,
    maths,
    policy_gradient,
)


@dataclass(frozen=True)
class Whitened(Signal):
    """[B, T]: (of - mean) / sqrt(variance + 1e-8), both over the trained tokens of the step."""

    of: Signal
    # MiniLLM's own; `objective.credits.refuse` keeps it out of other credits
    standardises: ClassVar[bool] = True

    def value(self, batch: Batch) -> Tensor:
        centred = maths.deviations(self.of(batch).expand(batch.shape), batch.mask)
        return centred / (maths.masked_mean(centred.square(), batch.mask) + 1e-8).sqrt()


@dataclass(frozen=True)
class LogMixture(Signal):
    """[B, T]: log(share pi_a + (1 - share) pi_b) of the sampled token."""

    a: str
    b: str
    share: float

    def value(self, batch: Batch) -> Tensor:
        return maths.mixture(batch.read(LogpFact(self.a)), batch.read(LogpFact(self.b)), self.share)


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
    clip: Clip = (0.2, 0.2),
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Method:
    """MiniLLM: KL(student || teacher) of whole sequences, so that a small student need not cover
    what it cannot represent.

        r_t = clip(log(pi_t/pi_s) / scale, +-clamp),  R_t = sum_k g^k r_{t+k} / (trained tokens from
        t on),  credit A = R whitened
        max(-A w, -A clip(w, 1 - low, 1 + high)),  w = pi_s / (a pi_t + (1 - a) pi_sampler)   +
        single_step * KL(pi_s || pi_t)

    both over all trained tokens. The second term is the exact gradient of r_t itself; `exact`
    leaves r_t out of R_t, as the paper's decomposition does and its code does not. `teacher_mix` a:
    tokens are drawn from a pi_t + (1 - a) pi_sampler, the teacher decoding beside the student; w is
    at most 1/(1 - a) on fresh rollouts. `advantage` "std", "mean" or "rloo" adds that of the reward
    to A.

    Source: arXiv 2306.08543 and its code. Departures: a = 0, as the student draws alone (paper 0.2:
    the teacher takes part in decoding); statistics over trained tokens only (its code counts
    padding as zeros). Not offered: the pre-training term on a text corpus. TRL's MiniLLM is
    scale=1, discount=0, length_norm=False, whiten=False, advantage="std".
    """
    if not 0 <= teacher_mix <= 1:
        raise ValueError(
            f"teacher_mix={teacher_mix} must lie in [0, 1]: the share of the teacher in what the "
            "rollouts were drawn from"
        )
    own = Floor(Ceiling(LogRatio("teacher", "student") / scale, clamp), -clamp)
    credit: Signal = ToGo(own, discount) - own if exact else ToGo(own, discount)
    if length_norm:
        length = ToGo(Const(1))
        credit = credit / Floor(length - 1 if exact else length, 1)
    if whiten:
        credit = Whitened(credit)
    if advantage is not None:
        credit = credit + Advantage(advantage)
    base = (
        LogMixture("teacher", "sampler" if rollout_cap is None else "student", teacher_mix)
        if teacher_mix
        else None
    )
    objective = Objective(policy_gradient(credit, clip, dual_clip, rollout_cap, base))
    if single_step:
        objective += Divergence("reverse_kl") * single_step
    return Method(objective, teacher_mix=teacher_mix)
