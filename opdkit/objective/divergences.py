"""Divergences between student and teacher, each a sum over the entries of the vocabulary.

`ls` and `lt` are log-probabilities of student and teacher in nats; only `ls` may carry a gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.base.errors import nearest
from opdkit.objective.maths import finite, mixture


class Kind(ABC):
    """A divergence between student and teacher as a sum of one contribution per vocabulary entry.

    Subclasses are frozen dataclasses.
    """

    @abstractmethod
    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:
        """[..., K] contributions of log-probs `ls`, `lt` [..., K], both finite."""

    def slope(self, l: Tensor) -> Tensor:
        """[...]: f'(u) at log u = `l` [...], no gradient, of a divergence E_teacher[f(u)], u = p_s
        / p_t.

        E_student[f'(u) grad log p_s] is the divergence's gradient: -f' is the credit of a single
        sample, f' the price of a ratio. A constant more or less changes neither. For a kind that
        gives no formula of its own it is the derivative of `entries`, where `l` is within 80 nats.
        """
        with torch.enable_grad():
            at = l.detach().clamp(-80.0, 80.0)
            # both sides measured from the larger one, so that neither overflows
            ls = torch.where(at > 0, 0.0, at).requires_grad_()
            entries = self.entries(ls, torch.where(at > 0, -at, 0.0))
            return torch.autograd.grad(entries.sum(), ls)[0] * (-ls.detach()).exp()

    def __str__(self) -> str:
        return {kind: name for name, kind in KINDS.items()}.get(self, repr(self))


@dataclass(frozen=True)
class ReverseKL(Kind):
    """KL(student || teacher) = sum_v p_s (log p_s - log p_t)."""

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return ls.exp() * (ls - lt)

    def slope(self, l: Tensor) -> Tensor:  # [...]
        return 1 + l


@dataclass(frozen=True)
class ForwardKL(Kind):
    """KL(teacher || student) = sum_v p_t (log p_t - log p_s)."""

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return lt.exp() * (lt - ls)

    def slope(self, l: Tensor) -> Tensor:  # [...]
        return -(-l).exp()


@dataclass(frozen=True)
class JSD(Kind):
    """Generalised Jensen-Shannon divergence of GKD, M = beta p_t + (1 - beta) p_s:

        beta KL(p_t || M) + (1 - beta) KL(p_s || M);   beta = 0: KL(p_t || p_s);   beta = 1: KL(p_s
        || p_t).

    The two ends are special-cased (as in TRL): the formula itself vanishes there like beta, so its
    gradient at beta = 0.01 is about 1 % of that at 0. `normalised` divides by beta (1 - beta) and
    is continuous up to both ends. beta sits on the teacher, as in TRL and Liger; KDFlow puts it on
    the student.
    """

    beta: float = 0.5
    normalised: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must lie in [0, 1]: 0 is forward KL, 1 reverse KL")

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        if self.beta == 0:
            return ForwardKL().entries(ls, lt)
        if self.beta == 1:
            return ReverseKL().entries(ls, lt)
        mix = torch.logaddexp(ls + math.log1p(-self.beta), lt + math.log(self.beta))
        total = self.beta * lt.exp() * (lt - mix) + (1 - self.beta) * ls.exp() * (ls - mix)
        return total / (self.beta * (1 - self.beta)) if self.normalised else total

    def slope(self, l: Tensor) -> Tensor:  # [...]
        if self.beta in (0, 1):
            return (ForwardKL() if self.beta == 0 else ReverseKL()).slope(l)
        # log(beta / u + 1 - beta), at most log(1 - beta) from below: the student's token is bounded
        mix = torch.logaddexp(math.log(self.beta) - l, torch.full_like(l, math.log1p(-self.beta)))
        return -mix / self.beta if self.normalised else -(1 - self.beta) * mix


@dataclass(frozen=True)
class SkewForward(Kind):
    """KL(teacher || alpha teacher + (1 - alpha) student), DistiLLM's SKL (arXiv 2402.03898); at
    most -log alpha.
    """

    alpha: float = 0.1

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return ForwardKL().entries(mixture(lt, ls, self.alpha), lt)


@dataclass(frozen=True)
class SkewReverse(Kind):
    """KL(student || (1 - alpha) teacher + alpha student), DistiLLM's SRKL (arXiv 2402.03898); at
    most -log alpha.
    """

    alpha: float = 0.1

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return ReverseKL().entries(ls, mixture(ls, lt, self.alpha))


@dataclass(frozen=True)
class Alpha(Kind):
    """Alpha divergence, 0 < a < 1: (sum p_t^a p_s^(1-a) - 1) / (a (a - 1)); a -> 1: KL(p_t || p_s),
    a -> 0: KL(p_s || p_t).
    """

    a: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.a < 1:
            raise ValueError(
                f"a={self.a} must lie strictly between 0 (reverse KL) and 1 (forward KL)"
            )

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        # p_t^a p_s^(1-a) - a p_t - (1 - a) p_s, measured from the larger of the two: 0 to the bit
        # where they are equal
        gap = lt - ls
        above = gap > 0
        share = self.a + (1 - 2 * self.a) * above.to(gap.dtype)
        below = torch.where(above, -gap, gap)
        power = torch.expm1(share * below) - share * torch.expm1(below)
        return torch.where(above, lt, ls).exp() * power / (self.a * (self.a - 1))

    def slope(self, l: Tensor) -> Tensor:  # [...]
        return -torch.expm1(-self.a * l) / self.a


@dataclass(frozen=True)
class Hellinger2(Kind):
    """Squared Hellinger distance, sum (sqrt p_s - sqrt p_t)^2 / 2 = 1 - sum sqrt(p_s p_t), in [0,
    1].
    """

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return 0.5 * ((0.5 * ls).exp() - (0.5 * lt).exp()).square()

    def slope(self, l: Tensor) -> Tensor:  # [...]
        return -0.5 * torch.expm1(-0.5 * l)


@dataclass(frozen=True)
class TotalVariation(Kind):
    """sum |p_s - p_t| / 2, in [0, 1]."""

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return 0.5 * (ls.exp() - lt.exp()).abs()

    def slope(self, l: Tensor) -> Tensor:  # [...]
        return 0.5 * l.sign()


@dataclass(frozen=True)
class Chi2(Kind):
    """Pearson chi-square of the student against the teacher: sum (p_s - p_t)^2 / p_t."""

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return lt.exp() * torch.expm1(ls - lt).square()

    def slope(self, l: Tensor) -> Tensor:  # [...]
        return 2 * torch.expm1(l)


@dataclass(frozen=True)
class ReverseChi2(Kind):
    """Neyman chi-square, Pearson's of the teacher against the student: sum (p_s - p_t)^2 / p_s."""

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return ls.exp() * torch.expm1(lt - ls).square()

    def slope(self, l: Tensor) -> Tensor:  # [...]
        return -torch.expm1(-2 * l)


KINDS: dict[str, Kind] = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "jsd": JSD(),
    "skew_forward": SkewForward(),
    "skew_reverse": SkewReverse(),
    "alpha": Alpha(),
    "hellinger2": Hellinger2(),
    "tv": TotalVariation(),
    "chi2": Chi2(),
    "reverse_chi2": ReverseChi2(),
}


def kind_of(kind: str | Kind) -> Kind:
    """A divergence by name ("reverse_kl", "forward_kl", "jsd" ...) or as it is (`JSD(0.1)`, one's
    own `Kind`).
    """
    if isinstance(kind, Kind):
        return kind
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: unknown divergence {kind!r}{nearest(str(kind), list(KINDS))}")
    return KINDS[kind]


def divergence(kind: Kind, ls: Tensor, lt: Tensor, cap: float | None = None) -> Tensor:
    """[...] = sum over the last dimension of the contributions of `ls`, `lt` [..., K], each at most
    `cap`.

    An entry that the teacher rules out (-inf) counts as the least probability float32 can hold, so
    that reverse KL stays finite there and pushes the student away; one that both rule out (a padded
    row, a missing entry) contributes nothing.
    """
    entries = kind.entries(finite(ls), finite(lt))
    if cap is not None:
        entries = entries.clamp(max=cap)
    return entries.sum(-1)
