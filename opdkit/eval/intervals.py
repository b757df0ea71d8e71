"""Confidence intervals of shares that do not vanish where every answer was right, or every one
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A confidence interval, in the unit of what it is about."""

    low: float
    high: float


def share_interval(
    per_problem: Sequence[float], *, samples: int = 1, level: float = 0.95
) -> Interval:
    """Of the mean of per-problem shares in [0, 1], each of `samples` answers.

    The exact interval of Clopper and Pearson at the effective number of answers n* = p (1 - p) / v,
    v the variance of the mean over problems: Korn and Graubard, Survey Methodology 24 (1998), 193.
    n* is at least the number of problems (variance cannot be larger) and at most the number of
    answers (they are independent at best). With one answer to a problem it is Clopper and Pearson's
    own, which covers the true share at least as often as `level` says, for every share and number
    of problems; problems are the unit of chance.
    """
    values = _checked(per_problem, level)
    problems, mean = len(values), float(values.mean())
    n = float(problems * max(samples, 1))
    if problems > 1 and 0 < mean < 1:
        variance = float(values.var(ddof=1)) / problems
        n = min(max(mean * (1 - mean) / max(variance, 1e-300), problems), n)
    else:
        n = float(problems)
    return exact(mean * n, n, level)


def difference_interval(
    per_problem: Sequence[float], *, samples: int = 1, level: float = 0.95
) -> Interval:
    """Of the mean of per-problem differences of shares, in [-1, 1].

    What was gained and what was lost are two shares, each with its interval; these are joined by
    the method of variance estimates recovery (Zou and Donner, Statistics in Medicine 27 (2008),
    1693), with the correlation of two shares of one sample. It does not vanish where nothing
    changed: of 30 problems that all came out the same, up to 12 % may still differ.
    """
    values = _checked(per_problem, level)
    up, down = np.clip(values, 0, 1), np.clip(-values, 0, 1)
    gained, lost = float(up.mean()), float(down.mean())
    more = share_interval(up.tolist(), samples=samples, level=level)
    less = share_interval(down.tolist(), samples=samples, level=level)
    both = gained * lost / ((1 - gained) * (1 - lost)) if max(gained, lost) < 1 else 0.0
    r = -math.sqrt(both)  # of the multinomial's two cells

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(a * a + b * b - 2 * r * a * b, 0.0))

    low = gained - lost - joined(gained - more.low, less.high - lost)
    high = gained - lost + joined(more.high - gained, lost - less.low)
    return Interval(max(low, -1.0), min(high, 1.0))


def exact(right: float, n: float, level: float = 0.95) -> Interval:
    """Clopper and Pearson's interval of a share, from `right` of n; neither need be whole."""
    tail = (1 - level) / 2
    low = 0.0 if right <= 0 else _quantile(tail, right, n - right + 1)
    high = 1.0 if right >= n else _quantile(1 - tail, right + 1, n - right)
    return Interval(low, high)


def _checked(per_problem: Sequence[float], level: float) -> np.ndarray:
    values = np.asarray(per_problem, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            "an interval needs one finite number per problem, and at least one problem"
        )
    if not 0 < level < 1:
        raise ValueError(f"an interval needs 0 < level < 1, got level={level}")
    return values


def _quantile(p: float, a: float, b: float) -> float:
    """The x at which the beta distribution (a, b) has the mass p below it."""
    low, high = 0.0, 1.0
    for _ in range(60):  # 2^-60 is below a float's rounding
        middle = (low + high) / 2
        low, high = (middle, high) if _beta(middle, a, b) < p else (low, middle)
    return (low + high) / 2


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _beta(1 - x, b, a)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(front + a * math.log(x) + b * math.log1p(-x)) / a
    tiny, c = 1e-300, 1.0
    d = 1 / _off_zero(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _off_zero(1 + term * d, tiny)
            c = _off_zero(1 + term / c, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction


def _off_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
