"""The losses: what a term minimises at one position of the live student."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from opdkit.objective import divergences, kernels, maths
from opdkit.objective.batch import Batch, Live
from opdkit.objective.divergences import (
    ForwardKL,
    Kind,
    ReverseKL,
    SkewForward,
    SkewReverse,
    kind_of,
)
from opdkit.objective.facts import LogpFact
from opdkit.objective.formula import Const, Signal
from opdkit.objective.grammar import Loss, TokenLoss, credit_of
from opdkit.objective.regions import MOST_APART as MOST_APART
from opdkit.objective.regions import Region
from opdkit.objective.signals import depends_on_sample
from opdkit.objective.support import Support

# ----------------------------------------------------------------------------------- sampled tokens


@dataclass(frozen=True)
class PolicyGradient(TokenLoss):
    """-ratio * credit at the sampled token, ratio = pi_s / pi_base with gradient, 1 in value on
    fresh rollouts.

    With credit log(teacher/student) its expected gradient is that of KL(student || teacher) at each
    prefix. With `cap` the ratio is to the student before the step, and what it disagrees with the
    base about is a weight: see `Outer`. To the base "live", the student as it is now, the ratio is
    always 1: REINFORCE.
    """

    credit: Signal
    base: str | Signal = "sampler"
    cap: float | None = None
    name: ClassVar[str] = "policy_gradient"

    def __post_init__(self) -> None:
        refuse_constant(self.credit)

    def value(self, live: Live) -> Tensor:  # [n]
        base = self.base if self.cap is None else "student"
        return -ratio(live, base) * live.pick(self.credit)

    @property
    def outer(self) -> Signal:
        return Const(1) if self.cap is None else Outer(self.base, self.cap)


@dataclass(frozen=True)
class Reinforce(TokenLoss):
    """-credit * log pi_s at the sampled token: a policy gradient without a ratio, whoever wrote the
    token and however far the student has moved since.
    """

    credit: Signal
    name: ClassVar[str] = "policy_gradient"

    def __post_init__(self) -> None:
        refuse_constant(self.credit)

    def value(self, live: Live) -> Tensor:  # [n]
        return -live.pick(self.credit) * live.logp


@dataclass(frozen=True)
class Bounds(Loss):
    """The settings of a clipped policy gradient; what it takes the ratio of is up to the loss.

    A clip compares the student with itself before the step, both as the trainer computes them: on
    fresh rollouts the ratio is exactly 1 and nothing is clipped. What the tokens were drawn from
    instead (another engine's rounding, a temperature, an earlier student) is a weight: `Outer`.

    low, high: the ratio is clipped to 1 - low .. 1 + high, infinite where it is not; dual: see
    `clipped`; base: what the tokens were drawn from, a model or its log-prob; cap: see `Outer`;
    region: what the ratio is held by in the place of a clip.
    """

    credit: Signal
    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    base: str | Signal = "sampler"
    cap: float | None = None
    region: Region | None = None
    name: ClassVar[str] = "policy_gradient"
    takes_dual: ClassVar[bool] = True  # a loss that clips the ratio alone has no such bound
    takes_region: ClassVar[bool] = False  # whether its value is what `bounded` says

    def __post_init__(self) -> None:
        refuse_constant(self.credit)
        if self.region is not None:
            self._refuse_region(self.region)
        if self.dual is not None and not self.takes_dual:
            raise ValueError(
                "dual_clip bounds PPO's clipped loss; this form bounds the ratio itself: use clip"
            )
        if self.dual is not None and not self.dual > 1:
            raise ValueError(
                f"dual_clip={self.dual} must be greater than 1: it bounds the loss of tokens with "
                "negative credit"
            )

    def _refuse_region(self, region: Region) -> None:
        if self.dual is not None or math.isfinite(self.low) or math.isfinite(self.high):
            raise ValueError(
                "clip, divergence_mask and smooth each hold the ratio in another way, and "
                "dual_clip belongs to the first: give one of the three"
            )
        if not self.takes_region:
            raise ValueError(
                f"{type(self).__name__} bounds its ratio in a way of its own, which no "
                "divergence_mask or smooth can stand in for: use clip"
            )
        if region.reads is not None and (self.over_rollouts or self.around != "student"):
            raise ValueError(
                "a mask over the whole vocabulary compares, token by token, the student with "
                "itself before the step; this loss takes its ratio of "
                + ("whole rollouts" if self.over_rollouts else f"tokens of {self.around}")
                + ": use mask_kind 'tv' or 'kl'"
            )

    @property
    def around(self) -> str | Signal:
        """The policy that the region lies around: a model, or its log-prob."""
        return "student"

    def bounded(
        self,
        r: Tensor,
        credit: Tensor,
        now: Tensor,
        before: Tensor,
        apart: Tensor | None = None,
    ) -> Tensor:
        """[...]: the loss of ratios with gradient and credits under these bounds; see
        `Region.loss`.
        """
        if self.region is None:
            return clipped(r, credit, self.low, self.high, self.dual)
        return self.region.loss(r, credit, now, before, apart)

    def bounded_at(self, live: Live, r: Tensor, credit: Tensor) -> Tensor:
        """[n]: the loss of tokens with ratios [n] with gradient and credits [n] under these
        bounds.
        """
        apart = None
        if self.region is not None and self.region.reads is not None:
            with torch.no_grad():
                before = live.vocabulary("student")
                apart = kernels.divergence(self.region.reads, live.own, before)
        return self.bounded(r, credit, live.logp, base_logp(live, self.around), apart)

    @property
    def outer(self) -> Signal:
        """[B, T], or [B, 1] of a loss over rollouts."""
        same = self.base in ("student", "live")
        return Const(1) if same else Outer(self.base, self.cap, self.over_rollouts)


@dataclass(frozen=True)
class Outer(Signal):
    """[B, T]: min(pi_student / pi_base, cap), what the trainer says of a token over what it was
    drawn from; no cap where it is None. [B, 1] of whole rollouts: of their mean log-ratio.
    """

    base: str | Signal
    cap: float | None = None
    whole: bool = False

    def value(self, batch: Batch) -> Tensor:  # [B, T] or [B, 1]
        apart = batch.read(LogpFact("student")) - base_logp(batch, self.base)
        if self.whole:
            apart = maths.row_mean(apart, batch.mask)
        return apart.clamp(-MOST_APART, MOST_APART).exp().clamp_max(self.cap or math.inf)


@dataclass(frozen=True)
class Clipped(Bounds, TokenLoss):
    """PPO's clipped policy gradient: max(-A r, -A clip(r, 1 - low, 1 + high)), r = pi_s / pi_s
    before the step; with `dual`, at most -A dual where A < 0; with a `region`, what that makes of
    A and r.
    """

    takes_region: ClassVar[bool] = True

    def value(self, live: Live) -> Tensor:  # [n]
        return self.bounded_at(live, ratio(live, "student"), live.pick(self.credit))


@dataclass(frozen=True)
class RatioWeighted(TokenLoss):
    """Another loss times min(pi_s / pi_base, most) of its token, pi_s the student as it is now: a
    weight without gradient, which moves from one update on the same rollouts to the next.
    """

    loss: TokenLoss
    base: str | Signal = "sampler"
    most: float = math.inf

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.loss.name

    @property
    def credit(self) -> Signal | None:
        return credit_of(self.loss)

    @property
    def outer(self) -> Signal:
        return self.loss.outer

    def defined(self, batch: Batch) -> Tensor | None:  # [B, T] or [B, 1] bool
        return self.loss.defined(batch)

    def joined(self, batch: Batch) -> Tensor | None:  # [B, T] bool
        return self.loss.joined(batch)

    def ready(self, weight: Tensor, batch: Batch) -> RatioWeighted:  # weight [B, T]
        loss: Any = self.loss.ready(weight, batch)
        return replace(self, loss=loss)

    def value(self, live: Live) -> Tensor:  # [n]
        return ratio(live, self.base).detach().clamp_max(self.most) * self.loss.value(live)


@dataclass(frozen=True)
class Likelihood(TokenLoss):
    """-log pi_s of the token that stands there."""

    name: ClassVar[str] = "likelihood"

    def value(self, live: Live) -> Tensor:  # [n]
        return -live.logp


@dataclass(frozen=True)
class EntropyBonus(TokenLoss):
    """-H(pi_s) at the token's place, over the whole vocabulary, nats: weighed positively it keeps
    the student undecided.
    """

    name: ClassVar[str] = "entropy_bonus"

    def value(self, live: Live) -> Tensor:  # [n]
        return -live.entropy


@dataclass(frozen=True)
class Estimator(TokenLoss):
    """A sampled-token estimator of KL(student || teacher), backpropagated; d = log pi_s - log pi_t.

    k2 = d^2 / 2 has the gradient of KL(student || teacher), k3 = exp(-d) + d - 1 that of KL(teacher
    || student). k1+ and k3+ have the value of k1 and k3 with the gradient of k2. k1 itself is
    refused: its gradient does not see the teacher and is zero on average.
    """

    kind: str = "k2"
    teacher: str = "teacher"

    def __post_init__(self) -> None:
        if self.kind == "k1":
            raise ValueError(
                "k1 = log pi_s - log pi_t backpropagated has the gradient of log pi_s alone: the "
                "teacher drops out and its expectation is zero. Use k2, k1+ (value of k1, gradient "
                "of k2), or PolicyGradient(LogRatio('teacher', 'student'))"
            )
        if self.kind not in ("k2", "k3", "k1+", "k3+"):
            raise ValueError(f"estimator {self.kind!r} must be one of k2, k3, k1+, k3+")

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.kind

    def value(self, live: Live) -> Tensor:  # [n]
        d = live.logp - live.read(LogpFact(self.teacher))
        if self.kind.endswith("+"):
            return maths.straight(maths.k1(d) if self.kind == "k1+" else maths.k3(d), maths.k2(d))
        return maths.k2(d) if self.kind == "k2" else maths.k3(d)


def base_logp(facts: Batch | Live, base: str | Signal) -> Tensor:
    """[B, T], or [n] of a live student: the log-prob of a model, or the one that a signal is.

    The student before the step is the live one until its first update: to the bit, whatever dtype
    and engine found the fact.
    """
    if isinstance(facts, Live) and (
        base == "live" or (base == "student" and not facts.batch.moved)
    ):
        return facts.logp.detach()
    if not isinstance(base, Signal):
        return facts.read(LogpFact(base))
    return facts.pick(base) if isinstance(facts, Live) else base(facts)


def log_ratio(live: Live, base: str | Signal) -> Tensor:
    """[n]: log pi_s - log pi_base at the sampled token, with gradient; `base` is a model, or the
    log-prob itself.
    """
    return (live.logp - base_logp(live, base)).clamp(-MOST_APART, MOST_APART)


def ratio(live: Live, base: str | Signal) -> Tensor:
    """[n]: pi_s / pi_base at the sampled token, with gradient; see `log_ratio`."""
    return log_ratio(live, base).exp()


def clipped(
    r: Tensor, credit: Tensor, low: float, high: float, dual: float | None = None
) -> Tensor:
    """PPO's loss of ratios and credits, [...] of one shape: max(-A r, -A clip(r, 1 - low, 1 +
    high)); with `dual`, at most -A dual where A < 0.
    """
    loss = torch.maximum(-credit * r, -credit * r.clamp(1 - low, 1 + high))
    return (
        loss if dual is None else torch.where(credit < 0, torch.minimum(loss, -credit * dual), loss)
    )


def refuse_constant(credit: Signal) -> None:
    """A credit that is the same whatever was sampled has zero expected gradient: it teaches nothing
    (miles #2362).
    """
    if not depends_on_sample(credit):
        raise ValueError(
            f"the credit {credit} does not depend on the sampled token: its policy gradient is "
            "zero on average, it only adds noise. Backpropagate it as Divergence(...), or subtract "
            "it from a credit as a baseline"
        )


# ------------------------------------------------------------------------------------- vocabularies


@dataclass(frozen=True)
class Divergence(TokenLoss):
    """A divergence between student and teacher, backpropagated through the student at a fixed
    prefix.

    kind: a name or a `Kind`. k and support: see `Support`; with k alone, the top k of the
    distribution the kind takes its expectation under (teacher for forward KL, student for reverse
    KL, else the union). rest: see `maths.restrict`. cap: upper bound of each vocabulary entry's
    contribution. temperature divides the logits of both, once.
    """

    kind: str | Kind = "reverse_kl"
    k: int | None = None
    support: str | None = None
    rest: str = "raw"
    cap: float | None = None
    temperature: float = 1.0
    teacher: str = "teacher"

    def __post_init__(self) -> None:
        kind = kind_of(self.kind)
        object.__setattr__(self, "kind", kind)
        if self.support is None:
            object.__setattr__(self, "support", "full" if self.k is None else natural_support(kind))
        where = self.where()
        if self.k == 1 and self.rest == "renormalise" and where.support in ("teacher", "student"):
            warnings.warn(
                "k=1 renormalised leaves one entry of probability 1 on both sides: identically "
                "zero",
                stacklevel=3,
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if self.temperature != 1.0 and where.support != "full" and self.rest != "renormalise":
            raise ValueError(
                f"temperature={self.temperature} with a top-k support and rest={self.rest!r} needs "
                "the normaliser of the whole vocabulary at that temperature: use "
                "rest='renormalise' or the full support"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        kind = kind_of(self.kind)
        return str(kind) if kind in divergences.KINDS.values() else type(kind).__name__.lower()

    def where(self) -> Support:
        return Support(self.support or "full", self.k, self.rest, teacher=self.teacher)

    def value(self, live: Live) -> Tensor:  # [n]
        kind, where, t = kind_of(self.kind), self.where(), self.temperature
        if where.support == "full":
            return kernels.divergence(kind, live.own, live.vocabulary(self.teacher), t, self.cap)
        ids, lt = where.entries(live.read)
        ls, lt = where.pair(live.at(ids) / t, lt / t)
        return kernels.divergence_on_support(kind, ls, lt, self.cap, where.whole)


def natural_support(kind: Kind) -> str:
    """Whose top k a divergence is summed over where nothing is said: the distribution it takes its
    expectation under.
    """
    if isinstance(kind, (ForwardKL, SkewForward)):
        return "teacher"
    return "student" if isinstance(kind, (ReverseKL, SkewReverse)) else "union"
