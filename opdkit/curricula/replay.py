"""Who writes a batch: the student now, the student earlier (replay), or the data set; DistiLLM's
adaptive off-policy schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from opdkit.base.rules import Rules, at_least, follow
from opdkit.curricula.base import Plain
from opdkit.curricula.data import DataWriter
from opdkit.curricula.recall import kept
from opdkit.curricula.store import StoreWriter
from opdkit.curricula.student import StudentWriter
from opdkit.curricula.writer import Memory, StepContext, Writer
from opdkit.types import Rollout

RAISE = 0.1  # added to the share of student text when the validation loss rises
SCHEDULES = {  # q / phi, by the share of the run that is done
    "decreasing": lambda done: 1 - done,
    "constant": lambda done: 0.5,
    "increasing": lambda done: done,
}
REPLAY: Rules = {
    "schedule": (
        lambda schedule: schedule in SCHEDULES,
        f"one of {', '.join(SCHEDULES)}",
        "it is how the freshly written share goes over the run",
    ),
    "threshold": (
        lambda share: 0 <= share <= 1,
        "in [0, 1]",
        "it is the share of student text at the start",
    ),
    "tolerance": (
        lambda rise: 0 <= rise < math.inf,
        "at least 0 and finite",
        "it is the rise of the validation loss, in nats, at which the share of student text rises",
    ),
    "capacity": at_least(1, "it is how many responses the store keeps"),
}


@dataclass(frozen=True)
class ReplayWriter(Writer):
    """The student, what it wrote before, or the data: one of them per step, as the schedule says
    (see `Replay`).
    """

    schedule: str
    threshold: float
    capacity: int
    cuts: ClassVar[bool] = False

    @property
    def reads_data(self) -> bool:
        return self.threshold < 1

    def write(self, context: StepContext) -> list[Rollout]:
        step, total_steps, memory = context.step, context.total_steps, context.memory
        return self.choose(context.coin, step, total_steps, memory).write(context)

    def fresh(self, phi: float, step: int, total_steps: int) -> float:
        """q: the share of batches that the student writes anew."""
        done = min(step / max(total_steps, 1), 1.0)
        return phi * SCHEDULES[self.schedule](done)

    def choose(self, coin: float, step: int, total_steps: int, memory: Memory) -> Writer:
        """Who writes the step for a draw in [0, 1)."""
        phi, full = memory.get("phi", self.threshold), len(memory.get("store", ())) >= self.capacity
        if coin < self.fresh(phi, step, total_steps) or (coin < phi and not full):
            return StudentWriter()
        return StoreWriter(self.capacity) if coin < phi else DataWriter()


@dataclass(frozen=True)
class Replay(Plain):
    """DistiLLM (arXiv 2402.03898): student text in a share phi of the batches, written anew in a
    share q <= phi.

        u ~ U(0, 1) per step:  u < q, or u < phi while the store is not full: the student;  else u <
        phi: the store;  else the data
        q = phi (1 - step/total) "decreasing", phi/2 "constant", phi step/total "increasing"

    phi starts at `threshold` and rises by 0.1, to at most 1, whenever the validation loss is
    `tolerance` above the loss at which it last rose (at first, that before training). The store
    holds the last `capacity` responses. Memory is plain JSON: phi, level (the loss at which phi
    last rose) and store (rollouts as dicts).
    """

    kind: ClassVar[str] = "replay"
    schedule: str = "decreasing"
    threshold: float = 0.0
    tolerance: float = 0.1
    capacity: int = 1000

    def __post_init__(self) -> None:
        follow(REPLAY, self)

    @property
    def authors(self) -> tuple[str, ...]:
        return ("student", "data")

    @property
    def measures(self) -> tuple[str, ...]:
        # at 1 all is student text already, and phi never falls
        return ("loss",) if self.threshold < 1 else ()

    @property
    def writer(self) -> Writer:
        return ReplayWriter(self.schedule, self.threshold, self.capacity)

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        """Memory with what the student has just written; replayed responses and those of the data
        are not stored again.
        """
        store = memory.get("store", [])
        known = {row["id"] for row in store}
        new = [kept(r) for r in rollouts if r.finish != "given" and r.id not in known]
        return {**memory, "store": [*store, *new][-self.capacity :]}

    def validated(self, measured: Mapping[str, float], memory: Memory) -> Memory:
        if "loss" not in self.measures:
            return memory
        loss, phi, level = measured["loss"], memory.get("phi", self.threshold), memory.get("level")
        if level is None:
            return {**memory, "phi": phi, "level": loss}
        if loss < level + self.tolerance:
            return memory
        return {**memory, "phi": min(phi + RAISE, 1.0), "level": loss}

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        phi = memory.get("phi", self.threshold)
        fresh = ReplayWriter(self.schedule, self.threshold, self.capacity).fresh
        stored = float(len(memory.get("store", ())))
        return {"phi": phi, "fresh": fresh(phi, step, total_steps), "stored": stored}
