"""What a comparison shows in a terminal: which run it is at, and in the end the standings."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opdkit.base.progress import duration
from opdkit.report.results import span
from opdkit.run.settings import Run
from opdkit.study.page import interval, per_seed, points
from opdkit.study.standings import TOKENS, Standing


@dataclass
class ComparisonScreen:
    """Which run of how many, a line now and then within it, and the time left, from the runs of
    this session.
    """

    total: int
    done: int
    every: float = 10.0  # seconds between lines
    clock: Callable[[], float] = time.monotonic
    spent: float = 0.0  # seconds of this session's finished runs
    ran: float = 0.0  # how many runs' work those were: a resumed run is less than one
    name: str = ""
    run: Run | None = None
    began: float = 0.0
    last: float = 0.0
    first: float | None = None  # share of the run that was done when it was resumed
    share: float = 0.0

    def begin(self, label: str, run: Run) -> None:
        self.name, self.run = f"{label}, seed {run.seed}", run
        self.began = self.last = self.clock()
        self.first, self.share = None, 0.0
        left = f"; {self.left(0)}" if self.ran else ""
        print(f"opdkit: run {self.done + 1} of {self.total}: {self.name}{left}", file=sys.stderr)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Is told of every step of a run."""
        assert self.run is not None
        share = step / self.run.steps
        if self.run.max_tokens is not None:
            share = min(max(share, metrics[TOKENS] / self.run.max_tokens), 1.0)
        if self.first is None:
            self.first = share * (step - 1) / step
        self.share = share
        now = self.clock()
        if now - self.last < self.every:
            return
        self.last = now
        words = [f"run {self.done + 1} of {self.total}: {self.name}, step {step}, {share:.0%}"]
        words += [
            f"{label} {metrics[key]:.3g}"
            for label, key in (("KL", "teacher_kl/sampled"), ("reward", "reward/mean"))
            if key in metrics
        ]
        if self.ran:
            words.append(self.left(share))
        print("  ".join(words), file=sys.stderr)

    def left(self, share: float) -> str:
        return f"about {duration(self.spent / self.ran * (self.total - self.done - share))} left"

    def end(self) -> None:
        """After every run, also one that failed."""
        announce = self.ran == 0
        self.spent += self.clock() - self.began
        self.ran += max(self.share - (self.first or 0.0), 0.05)
        self.done += 1
        if announce and self.done < self.total:
            each = duration(self.spent / self.ran)
            print(
                f"opdkit: a run takes about {each}: {self.left(0)} for the "
                f"{self.total - self.done} others",
                file=sys.stderr,
            )


def text_table(ranked: Sequence[Standing]) -> str:
    """The standings for a terminal."""
    first = ranked[0].label if ranked else ""
    rows = [
        [
            "method",
            "accuracy",
            "95%",
            f"points to {first}",
            "95%",
            "by seed",
            "KL",
            "steps",
            "tokens",
        ]
    ]
    for s in ranked:
        d = s.difference
        change = [points(d.value), interval(d), per_seed(s)] if d else ["", "", ""]
        kl = "" if s.kl is None else f"{s.kl:.4f}"
        rows.append(
            [
                s.label,
                f"{s.accuracy.value:.1%}",
                span(s.accuracy),
                *change,
                kl,
                f"{s.steps:.0f}",
                f"{s.tokens:,.0f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
