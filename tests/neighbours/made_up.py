"""An experiment whose outcome is known: line "b" lies `gap` above "a" with every seed."""

from dataclasses import dataclass

from opdkit.neighbours.experiment import Experiment, Progress
from opdkit.neighbours.outcome import Curves, Outcome, differences, last

CLAIM = "b is higher than a [by a gap]."
SOURCE = "arXiv:0000.00000"
NEEDS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings(Experiment):
    gap: float = 0.5
    points: int = 3


def run(settings: Settings, progress: Progress) -> Outcome:
    a, b = [], []
    with progress("Counting", total=settings.seeds, unit="runs") as tick:
        for seed in range(settings.seeds):
            a.append([float(seed + x) for x in range(settings.points)])
            b.append([y + settings.gap for y in a[-1]])
            tick(seed + 1)
    more = differences(last(b), last(a))
    return Outcome(
        CLAIM,
        f"b is {more} higher.",
        [Curves("counts", "x", "y", range(settings.points), {"a": a, "b": b})],
        [{"line": "a", "last": a[0][-1]}, {"line": "b [made up]", "last": b[0][-1]}],
        holds=more.low > 0,
    )
