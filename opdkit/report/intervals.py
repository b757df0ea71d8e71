"""Stretches of time: what any of them covers, what two have in common, how long they last."""

from __future__ import annotations

import math
from collections.abc import Iterable

Intervals = list[tuple[float, float]]  # seconds, apart and in order


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """The time that any of them covers."""
    out: Intervals = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        elif end > start:
            out.append((start, end))
    return out


def both(a: Intervals, b: Intervals) -> Intervals:
    """The time that is in both."""
    out: Intervals = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if end > start:
            out.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return out


def without(a: Intervals, b: Intervals) -> Intervals:
    """The time in `a` that is not in `b`."""
    ends = [-math.inf, *(t for interval in b for t in interval), math.inf]
    return both(a, list(zip(ends[::2], ends[1::2])))


def measure(intervals: Intervals) -> float:
    """Seconds."""
    return sum(end - start for start, end in intervals)
