"""Divergences to a mixture of teacher and student, written as one formula that has its gradient in
closed form.

With M = a q + (1 - a) p, p the student, q the teacher, ls, lt, m the logs of p, q, M:

    value = sum_v  t q (lt - m) + s p (ls - m)
    slope = s p (ls - m) + k p q / M,   k = s a - t (1 - a)                d value / d ls

Where both sum to one, a multiple of p in the slope drops out of d value / d logits = slope - p
sum_v slope. Taken off, k p leaves what is 0 to the bit where the models agree:

    slope - k p = s p (ls - m) + k (1 - a) p (q - p) / M

Forward KL is (a, t, s) = (0, 1, 0), where it is p - q; reverse KL (1, 0, 1); the generalised JSD
(b, b, 1 - b), where k = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.objective import divergences, maths
from opdkit.objective.divergences import JSD, ForwardKL, Kind, ReverseKL, SkewForward, SkewReverse


@dataclass(frozen=True)
class Formula:
    """The weights of the formula above."""

    a: float  # the teacher's share of the mixture
    t: float  # weight of KL(teacher || M)
    s: float  # weight of KL(student || M)
    k: float  # weight of p q / M in the slope: s a - t (1 - a), which must not be rounded


FORWARD, REVERSE = Formula(0.0, 1.0, 0.0, -1.0), Formula(1.0, 0.0, 1.0, 1.0)


def formula(kind: Kind) -> Formula | None:
    """The weights of a divergence; None where it is no divergence to a mixture."""
    if type(kind) is ForwardKL:
        return FORWARD
    if type(kind) is ReverseKL:
        return REVERSE
    if type(kind) is JSD:
        b = kind.beta
        if b in (0, 1):
            return REVERSE if b else FORWARD
        scale = b * (1 - b) if kind.normalised else 1.0
        return Formula(b, b / scale, (1 - b) / scale, 0.0)
    if type(kind) is SkewForward and 0 <= kind.alpha < 1:
        return Formula(kind.alpha, 1.0, 0.0, kind.alpha - 1)
    if type(kind) is SkewReverse and 0 <= kind.alpha < 1:
        return Formula(1 - kind.alpha, 0.0, 1.0, 1 - kind.alpha)
    return None


def derived(
    form: Formula, ls: Tensor, lt: Tensor, cap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Contributions, each at most `cap`, their slopes less k p, and the student's probabilities p,
    all [..., V], of log-probs [..., V], which are overwritten. No gradient.
    """
    # exactly 0 where an entry is ruled out
    p, q = ls.exp(), None if form.a == 1 else lt.exp()
    gone = ls == -torch.inf if form.a == 0 else None
    for x in (ls, lt):
        x.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=maths.LOGP_FLOOR)  # `maths.finite`
    if q is None:
        entries = slope = ls.sub_(lt).mul_(p)
    elif gone is not None:
        entries = lt.sub_(ls).mul_(q)
        slope = torch.sub(p, q, out=q).masked_fill_(gone, 0.0)
    else:
        entries, slope = _to_mixture(form, ls, lt, p, q)
    if cap is not None:
        slope = torch.where(entries > cap, -form.k * p, slope)
        entries = entries.clamp(max=cap)
    return entries, slope, p


def _to_mixture(
    form: Formula, ls: Tensor, lt: Tensor, p: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """Contributions and slopes less k p, of log-probs ls, lt and probabilities p, q, all [..., V],
    for 0 < a < 1; ls and lt are overwritten.

    M is measured from the larger of the two: log(M / q) = log(1 + (1 - a) (p - q) / q) where q > p,
    log(M / p) likewise. Where they are equal both are 0 to the bit, as log(a q + (1 - a) p) - log p
    is not.
    """
    tiny = torch.finfo(p.dtype).tiny  # both may have underflowed
    apart = torch.sub(q, p).div_(torch.maximum(p, q).clamp_min_(tiny))  # in [-1, 1]
    log_share = torch.minimum(apart * form.a, apart.mul_(form.a - 1)).log1p_()
    gap = lt.sub_(ls)
    entries = slope = torch.clamp(gap, min=0.0, out=ls).add_(log_share).mul_(p).mul_(-form.s)
    if form.t:
        entries = slope.addcmul(gap.clamp_max_(0.0).sub_(log_share), q, value=form.t)
    if form.k:
        mix = torch.sub(q, p).mul_(form.a).add_(p).clamp_min_(tiny)
        lean = (q - p).mul_(p).div_(mix)
        slope = slope.add(lean, alpha=form.k * (1 - form.a))
    return entries, slope


def divergence_on_support(
    kind: Kind, ls: Tensor, lt: Tensor, cap: float | None = None, whole: bool = False
) -> Tensor:
    """[...]: `divergences.divergence` of log-probs ls, lt [..., K], gradient the student's.

    `whole`: both sum to one over the last dimension, so that the slope may lack a multiple of p.
    Then models that agree have no gradient, to the bit.
    """
    form = formula(kind)
    if form is None:
        return divergences.divergence(kind, ls, lt, cap)
    return _OnSupport.apply(ls, lt, form, cap, whole).sum(-1)


class _OnSupport(torch.autograd.Function):
    """Contributions [..., K] of log-probs [..., K]."""

    @staticmethod
    def forward(
        ctx: Any, ls: Tensor, lt: Tensor, form: Formula, cap: float | None, whole: bool
    ) -> Tensor:
        entries, slope, p = derived(form, ls.clone(), lt.clone(), cap)
        ctx.save_for_backward(slope if whole or not form.k else slope + form.k * p)
        return entries

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None, None
