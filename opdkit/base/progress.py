"""Progress with rate and time left, on stderr: a bar in a terminal, a plain line now and then
elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 15.0  # seconds between plain lines where stderr is not a terminal


@contextmanager
def progress(
    what: str,
    *,
    total: int | None = None,
    unit: str = "",
    every: float = EVERY,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """`with progress("Evaluating", total=200, unit="problems") as tick: tick(done)`, where `done`
    counts from the start.

    The bar vanishes at the end. Without a terminal nothing is printed by work that takes less than
    `every` seconds.
    """
    console = _console()
    if console.is_terminal:
        with _bar(console, what, total, unit) as tick:
            yield tick
    else:
        lines = _Lines(what, total, unit, every, clock)
        yield lines.tick
        lines.end()


def duration(seconds: float) -> str:
    """`8 s`, `3:05`, `2:03:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(per_second: float, unit: str) -> str:
    """`12.5 problems/s`, and `3.2 s each` where one takes longer than a second."""
    if per_second <= 0:
        return ""
    if per_second < 1:
        return f"{1 / per_second:.1f} s each"
    number = f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"
    return f"{number} {unit or 'it'}/s"


class _Lines:
    """Plain lines for logs: `Evaluating: 120/500 problems, 12.5 problems/s, 30 s left`."""

    def __init__(
        self, what: str, total: int | None, unit: str, every: float, clock: Callable[[], float]
    ):
        self.what, self.total, self.unit, self.every, self.clock = what, total, unit, every, clock
        self.start = self.last = clock()
        self.done, self.printed = 0, False

    def tick(self, done: int) -> None:
        self.done = done
        now = self.clock()
        if now - self.last < self.every:
            return
        self.last, self.printed = now, True
        speed = done / max(now - self.start, 1e-9)  # two ticks may read the same time
        left = (
            f"{duration((self.total - done) / speed)} left"
            if self.total is not None and speed > 0
            else ""
        )
        self._print(
            ", ".join(part for part in (self._count(), rate(speed, self.unit), left) if part)
        )

    def end(self) -> None:
        """Close what was begun; work too short to be announced stays silent."""
        if self.printed:
            self._print(f"{self._count()} in {duration(self.clock() - self.start)}")

    def _count(self) -> str:
        return (f"{self.done}" if self.total is None else f"{self.done}/{self.total}") + (
            f" {self.unit}" if self.unit else ""
        )

    def _print(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)


_CONSOLES: list[Console] = []


def _console() -> Console:
    """The one console of this process: rich stacks nested bars only where they share it."""
    from rich.console import Console

    if not _CONSOLES:
        _CONSOLES.append(Console(stderr=True))
    return _CONSOLES[0]


@contextmanager
def _bar(
    console: Console, what: str, total: int | None, unit: str
) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(TextColumn):
        def render(self, task: Task) -> Text:
            return Text(rate(task.finished_speed or task.speed or 0.0, unit), style="cyan")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        Rate(""),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
