"""ScienceWorld (arXiv 2203.07540): experiments of a school's science lessons, in a simulated house,
by commands such as "pick up thermometer" and "pour beaker into sink".
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from opdkit.base.errors import UserError, nearest
from opdkit.base.files import read_text, write_json
from opdkit.base.progress import progress
from opdkit.base.rules import Rules, follow
from opdkit.environments.base import Environment, Scored
from opdkit.environments.commands import command_of, needs_package
from opdkit.environments.settings import EnvironmentSettings
from opdkit.types import DataRow

PARTS = ("train", "dev", "test")
TASKS: Rules = {
    "variations": (
        lambda which: which in PARTS or (isinstance(which, tuple) and len(which) > 0),
        f"a list of numbers, or one of {', '.join(PARTS)}",
        "it says which forms of the task are asked",
    ),
}
ASKED = "Answer with one command."
# without it a Java machine orders what a room holds by where objects lie in memory, and two
# episodes of the same actions would read different texts
ORDERED = ("-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2")


class Simulator:
    """The simulator in a Java machine of its own, which ends with this process. It has room for any
    number of worlds; each of them is one object there.

    What it computes of one world it computes whole: all calls go through `lock`, as worlds share
    what they are made from.
    """

    def __init__(self) -> None:
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from scienceworld.constants import BASEPATH, JAR_PATH

        port, process = launch_gateway(
            classpath=JAR_PATH,
            javaopts=list(ORDERED),
            die_on_exit=True,
            cwd=BASEPATH,
            return_proc=True,
        )
        self.gateway = JavaGateway(
            gateway_parameters=GatewayParameters(auto_field=True, port=port), java_process=process
        )
        self.lock = Lock()

    def world(self) -> Any:
        """A world in which nothing is loaded yet."""
        return self.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()


@lru_cache(maxsize=1)
def _simulator_of(process: int) -> Simulator:
    return Simulator()


def simulator() -> Simulator:
    """The simulator of this process: a forked one does not speak with its parent's."""
    return _simulator_of(os.getpid())


class ScienceWorld(Environment):
    """One task, from its beginning. A turn is one command, its last line (see `command_of`)."""

    def __init__(self, commands: bool = True):
        """commands: whether the opening lists the forms of commands."""
        self.commands = commands
        self.simulator = simulator()
        self.world: Any = None
        self.points, self.over = 0, False

    def reset(self, row: DataRow, seed: int) -> str:
        """What is to be done, and what is seen first. A world has no chance in it: `seed` changes
        nothing.
        """
        try:
            loaded = str(row["task"]), int(row["variation"]), str(row.get("simplifications", ""))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"row {row.get('id')}: ScienceWorld reads the columns 'task' (a name) and "
                "'variation' (a number) and finds none. Leave `data` out, and the environment "
                "gives its own rows"
            ) from error
        with self.simulator.lock:
            self.world = self.simulator.world()
            _load(self.world, *loaded)
            task, seen = self.world.getTaskDescription(), self.world.freeActionLook()
            known = list(self.world.getPossibleActions()) if self.commands else []
        self.points, self.over = 0, False
        forms = f"Commands: {', '.join(known)}. OBJ is a thing.\n" if known else ""
        return f"{task.strip()}\n{ASKED}\n{forms}{seen.strip()}"

    def step(self, action: str) -> str:
        command = command_of(action)
        if not command:
            return "Say what to do."
        with self.simulator.lock:
            seen = self.world.step(command)
            self.points = round(100 * self.world.getScore())
            # a task that can no longer be done has a negative score
            self.over = bool(self.world.getCompleted()) or self.points < 0
        return str(seen).strip()

    @property
    def done(self) -> bool:
        return self.over

    def score(self) -> Scored:
        """Its points of 100, as a share; none where the task was lost. Correct: all of them."""
        points = max(self.points, 0)
        how = "is done" if points >= 100 else f"is not done: {points} of 100 points"
        lost = ", and can no longer be done" if self.points < 0 else ""
        return Scored(points / 100, points >= 100, f"The task {how}{lost}.")

    def close(self) -> None:
        self.world = None  # the Java machine forgets what no object here speaks of


def _load(world: Any, task: str, variation: int, simplifications: str, gold: bool = False) -> None:
    """Loads a task into a world, and with `gold` how it is done."""
    names = list(world.getTaskNames())
    if task not in names:
        raise UserError(f"ScienceWorld has no task {task!r}{nearest(task, names)}")
    easier = ["easy", *world.getPossibleSimplifications().split(", ")]
    for name in filter(None, simplifications.split(",")):
        if name not in easier:
            raise UserError(f"ScienceWorld has no simplification {name!r}{nearest(name, easier)}")
    most = world.getTaskMaxVariations(task)
    if not 0 <= variation < most:
        raise UserError(
            f"the task {task!r} has no variation {variation}: they are numbered from 0 to "
            f"{most - 1}"
        )
    world.load(task, variation, simplifications, gold)
    world.reset()


@dataclass(frozen=True)
class ScienceWorldSettings(EnvironmentSettings):
    """Variations of one task; each is a row, with the simulator's own solution in the column
    `actions`. They are found once and kept in `folder`.

    Arguments:
        task: such as "find-plant" or "boil".
        variations: their numbers, or those that ScienceWorld has for "train", "dev" or "test".
        simplifications: "easy" (all that make it easier), some by name (with commas), or "".
        folder: where the tasks' texts and solutions are kept.
        commands: whether the opening lists the forms of commands.
    """

    kind: ClassVar[str] = "scienceworld"
    task: str = "find-plant"
    variations: tuple[int, ...] | str = "train"
    simplifications: str = "easy"
    folder: str = "runs/scienceworld"
    commands: bool = True
    max_turns: int | None = field(default=30, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        follow(TASKS, self)

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        return {"task": text}

    def check(self) -> None:
        needs_package(self.kind, "scienceworld")
        if shutil.which("java") is None:
            raise UserError(
                "the environment 'scienceworld' is simulated by a Java program, and there is no "
                "`java` on this machine: install a Java runtime from the system's packages, such "
                "as `apt-get install default-jre-headless`"
            )

    def make(self) -> Environment:
        return ScienceWorld(self.commands)

    def rows(self) -> list[DataRow]:
        self.check()
        numbers = self._numbers()
        rows = []
        with progress("Reading tasks", total=len(numbers), unit="tasks") as tick:
            for done, variation in enumerate(numbers, 1):
                easier = self.simplifications.replace(",", "+") or "plain"
                path = Path(self.folder) / f"{self.task}-{easier}-{variation}.json"
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, self._row(variation))
                rows.append(json.loads(read_text(path, "a task of ScienceWorld")))
                tick(done)
        return rows

    def _numbers(self) -> list[int]:
        """The variations, by number."""
        if not isinstance(self.variations, str):
            return list(self.variations)
        shared = simulator()
        with shared.lock:
            world = shared.world()
            _load(world, self.task, 0, self.simplifications)
            part = {
                "train": world.getVariationsTrain,
                "dev": world.getVariationsDev,
                "test": world.getVariationsTest,
            }
            return [int(n) for n in part[self.variations]()]

    def _row(self, variation: int) -> DataRow:
        """A variation with its solution, played to its end; without one that does not succeed."""
        shared, loaded = simulator(), (self.task, variation, self.simplifications)
        with shared.lock:
            world = shared.world()
            _load(world, *loaded, gold=True)
            actions = [str(action) for action in world.getGoldActionSequence()]
            _load(world, *loaded)
            for action in actions:
                world.step(action)
            row: DataRow = {
                "id": f"scienceworld-{self.task}-{variation}",
                "prompt": str(world.getTaskDescription()).strip(),
                "task": self.task,
                "variation": variation,
                "simplifications": self.simplifications,
            }
            return row | ({"actions": actions} if world.getScore() >= 1 else {})
