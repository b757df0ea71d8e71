"""What an experiment found: curves over seeds, a table, and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# two-sided 95 % points of Student's distribution with 1, 2, ... 30 degrees of freedom
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Curves:
    """One panel of a figure: for each line `[seeds][points]` of y, over the points `x`."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[Sequence[float]]]
    log: bool = False  # both axes


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Arguments:
        claim: what the paper says, in one sentence.
        found: what came out here, in one or two sentences with figures and intervals.
        panels: the figure.
        table: rows of columns by name, the same in each.
        holds: whether the claim was seen here.
    """

    claim: str
    found: str
    panels: Sequence[Curves]
    table: Sequence[Mapping[str, str | float]] = field(default_factory=tuple)
    holds: bool = True


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % interval; of one seed the interval is everything."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_of(values: Sequence[float]) -> Mean:
    """Of one number per seed: mean +- t s / sqrt(n). Seeds are the unit of chance.

    Two lines that share their seeds are compared by `mean_of` their differences, seed by seed.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    half = t * math.sqrt(variance / n)
    return Mean(mean, mean - half, mean + half)


def last(lines: Sequence[Sequence[float]]) -> list[float]:
    """Each seed's value at the last point."""
    return [line[-1] for line in lines]


def area(lines: Sequence[Sequence[float]]) -> list[float]:
    """Each seed's mean over the points."""
    return [math.fsum(line) / len(line) for line in lines]


def differences(ours: Sequence[float], theirs: Sequence[float]) -> Mean:
    """Ours less theirs, seed by seed."""
    return mean_of([a - b for a, b in zip(ours, theirs, strict=True)])
