"""Avg@k, Pass@k and how sure we are of them: problems are the unit of chance, samples of one
problem are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opdkit.eval.intervals import Interval, difference_interval, share_interval


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its interval."""

    value: float
    interval: Interval


def avg_at_k(correct: Sequence[Sequence[bool | float]]) -> float:
    """The share of correct samples of a problem, averaged over problems.

    `correct` is problems x samples.

    Every problem counts the same, whatever its number of samples.
    """
    return float(np.mean(problem_means(correct)))


def problem_means(correct: Sequence[Sequence[bool | float]]) -> list[float]:
    """Per problem, the share of its samples that are correct."""
    if not correct or not all(len(samples) for samples in correct):
        raise ValueError("Avg@k needs at least one problem, and at least one sample of each")
    return [float(np.mean(np.asarray(samples, dtype=float))) for samples in correct]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples is right, from n samples of which c are: 1 - C(n-c,
    k) / C(n, k).

    Unbiased, since the k are drawn without replacement. arXiv:2107.03374, section 2.1.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct of {n} samples is impossible")
    if not 1 <= k <= n:
        raise ValueError(
            f"Pass@{k} cannot be estimated from {n} samples per problem: draw at least "
            f"{max(k, 1)}, or ask for 1 <= k <= {n}"
        )
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def estimate(
    values_per_problem: Sequence[float], *, samples: int = 1, level: float = 0.95
) -> Estimate:
    """The mean of per-problem shares, each of `samples` answers, with its interval."""
    interval = share_interval(values_per_problem, samples=samples, level=level)
    return Estimate(float(np.mean(values_per_problem)), interval)


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, samples: int = 1, level: float = 0.95
) -> Estimate:
    """Mean of b - a over the same problems in the same order, with its interval.

    Much narrower than the two intervals apart: how hard each problem is cancels.
    """
    if len(a) != len(b):
        raise ValueError(
            f"a paired difference needs the same problems twice, got {len(a)} and {len(b)} values"
        )
    change = np.subtract(b, a, dtype=float).tolist()
    interval = difference_interval(change, samples=samples, level=level)
    return Estimate(float(np.mean(change)), interval)
