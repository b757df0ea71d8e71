"""What an experiment found: curves over seeds, a table, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Curves:
    """One panel of a figure: for each line `[seeds][points]` of y, over the points `x`."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[Sequence[float]]]


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
