"""Finding an experiment, running it and keeping what it found."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from opdkit.base.config import build, plain
from opdkit.base.errors import UserError, nearest, shown
from opdkit.base.files import write_json
from opdkit.base.progress import progress
from opdkit.neighbours import NEIGHBOURS
from opdkit.neighbours.figure import draw
from opdkit.neighbours.outcome import Outcome

# `with progress("Learning", total=20, unit="runs") as tick: tick(done)`
Progress = Callable[..., AbstractContextManager[Callable[[int], None]]]


@contextmanager
def counted(progress: Progress, what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """`with counted(progress, "Learning", 20, "runs") as tick: tick()` after each of them."""
    done = count(1)
    with progress(what, total=total, unit=unit) as report:
        yield lambda: report(next(done))


@dataclass(frozen=True)
class Experiment:
    """What can be chosen of every experiment.

    Arguments:
        seeds: runs of each kind, with the seeds 0, 1, ...: a figure's intervals are over them.
        output: folder for what it finds; runs/neighbours/NAME where none is given.
    """

    seeds: int = 10
    output: str = ""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1: there is nothing to run")


class Neighbour(Protocol):
    """A module that `NEIGHBOURS` names."""

    CLAIM: str
    SOURCE: str
    NEEDS: Sequence[str]
    Settings: type[Experiment]

    @staticmethod
    def run(settings: Any, progress: Progress) -> Outcome: ...


def neighbour(name: str) -> Neighbour:
    """The module of that name."""
    if name not in NEIGHBOURS:
        raise UserError(
            f"there is no neighbour {shown(name)}{nearest(name, list(NEIGHBOURS))}. "
            "`opdkit neighbours` lists them"
        )
    module: Any = import_module(NEIGHBOURS[name])
    return module


def listed() -> list[dict[str, str]]:
    """Each with its claim and where it is from."""
    modules = {name: neighbour(name) for name in NEIGHBOURS}
    return [
        {"name": name, "claim": module.CLAIM, "source": module.SOURCE}
        for name, module in modules.items()
    ]


def launch(name: str, values: Mapping[str, Any]) -> tuple[Outcome, Path]:
    """Run one with these settings; its folder then holds figure.png and outcome.json."""
    module = neighbour(name)
    settings = build(module.Settings, values)
    settings = replace(settings, output=settings.output or f"runs/neighbours/{name}")
    for package in ("matplotlib", *module.NEEDS):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the experiment {name!r} needs the package {package}, which is not installed: pip "
                "install 'opdkit[neighbours]'"
            )
    folder = Path(settings.output)
    try:  # before an hour's work
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output={settings.output}: no folder can be there ({error.strerror}), so what is "
            "found could not be kept: choose another"
        ) from None
    start = time.monotonic()
    outcome = module.run(settings, progress)
    draw(outcome, folder / "figure.png")
    kept = {
        "name": name,
        "source": module.SOURCE,
        **plain(outcome),
        "panels": [{**plain(panel), "x": list(panel.x)} for panel in outcome.panels],
        "settings": plain(settings),
        "seconds": round(time.monotonic() - start, 1),
    }
    write_json(folder / "outcome.json", kept)
    return outcome, folder
