"""Divergences to a mixture of teacher and student, written as one formula that has its gradient in
closed form.

With M = a q + (1 - a) p, p the student, q the teacher, ls, lt, m the logs of p, q, M:

    value = sum_v  t q (lt - m) + s p (ls - m)
    slope = s p (ls - m) + k p q / M,   k = s a - t (1 - a)        d value / d ls, up to a multiple
    of p
    d value / d logits = slope - p sum_v slope                      where that multiple cancels

Forward KL is (a, t, s) = (0, 1, 0), where p q / M = q; reverse KL (1, 0, 1), where p q / M = p
cancels; the generalised JSD (b, b, 1 - b), where k = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdkit.objective.maths import JSD, ForwardKL, Kind, ReverseKL, SkewForward, SkewReverse


@dataclass(frozen=True)
class Formula:
    """The weights of the formula above."""

    a: float  # the teacher's share of the mixture
    t: float  # weight of KL(teacher || M)
    s: float  # weight of KL(student || M)

    @property
    def k(self) -> float:
        """Weight of p q / M in the slope."""
        return self.s * self.a - self.t * (1 - self.a)


FORWARD, REVERSE = Formula(0.0, 1.0, 0.0), Formula(1.0, 0.0, 1.0)


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
        return Formula(b, b / scale, (1 - b) / scale)
    if type(kind) is SkewForward and 0 <= kind.alpha < 1:
        return Formula(kind.alpha, 1.0, 0.0)
    if type(kind) is SkewReverse and 0 <= kind.alpha < 1:
        return Formula(1 - kind.alpha, 0.0, 1.0)
    return None
