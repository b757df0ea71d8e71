"""Who writes a batch: the student now, the student earlier (replay), or the data set; DistiLLM's
adaptive off-policy schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch

from opdkit.base.errors import UserError
from opdkit.curricula.base import Memory, Plain, coin
from opdkit.objective.maths import keyed_uniform
from opdkit.types import Rollout

RAISE = 0.1  # added to the share of student text when the validation loss rises


@dataclass(frozen=True)
class Replay(Plain):
    """DistiLLM (arXiv 2402.03898): student text in a share phi of the batches, written anew in a
    share q <= phi.

        u ~ U(0, 1) per step:  u < q, or u < phi while the store is not full: "student";  else u <
        phi: "replay";  else "data"
        q = phi (1 - step/total) "decreasing", phi/2 "constant", phi step/total "increasing"

    phi starts at `threshold` and rises by 0.1, to at most 1, whenever the validation loss is
    `tolerance` above the loss at which it last rose (at first, that before training). The store
    holds the last `capacity` responses. Memory is plain JSON: phi, level (the loss at which phi
    last rose) and store (rollouts as dicts).
    """

    schedule: str = "decreasing"
    threshold: float = 0.0
    tolerance: float = 0.1
    capacity: int = 1000
    validates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.schedule not in ("decreasing", "constant", "increasing"):
            raise ValueError(
                f"schedule={self.schedule!r} must be one of decreasing, constant, increasing"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} must lie in [0, 1]: the share of student text at the "
                "start"
            )
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity} must be at least 1")

    def fresh(self, phi: float, step: int, total_steps: int) -> float:
        """q: the share of batches that the student writes anew."""
        done = min(step / max(total_steps, 1), 1.0)
        return phi * {"decreasing": 1 - done, "constant": 0.5, "increasing": done}[self.schedule]

    def choose(self, u: float, step: int, total_steps: int, memory: Memory) -> str:
        """ "student", "replay" or "data" for a draw u in [0, 1)."""
        phi, full = memory.get("phi", self.threshold), len(memory.get("store", ())) >= self.capacity
        if u < self.fresh(phi, step, total_steps) or (u < phi and not full):
            return "student"
        return "replay" if u < phi else "data"

    def source(self, step: int, total_steps: int, seed: int, memory: Memory) -> str:
        """Who writes this step's batch; the same draw in a resumed run."""
        return self.choose(coin(step, seed), step, total_steps, memory)

    def replay(self, count: int, step: int, seed: int, memory: Memory) -> list[Rollout]:
        """`count` different responses of the store, drawn at random."""
        store = memory.get("store", [])
        if count > len(store):
            raise UserError(
                f"a batch of {count} responses cannot be drawn from a store of {len(store)}: "
                f"set capacity (now {self.capacity}) to at least the responses of one step"
            )
        order = keyed_uniform(seed, step, "replay", torch.arange(len(store)), 1, torch.float64)[
            :, 0
        ].argsort()
        return [Rollout(**store[i]) for i in order[:count].tolist()]

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        """Memory with what the student has just written; replayed responses and those of the data
        are not stored again.
        """
        store = memory.get("store", [])
        known = {row["id"] for row in store}
        new = [
            asdict(replace(r, notes=None))
            for r in rollouts
            if r.finish != "given" and r.id not in known
        ]
        return {**memory, "store": [*store, *new][-self.capacity :]}

    def validated(self, loss: float, memory: Memory) -> Memory:
        """Memory after an evaluation on held-out data; the first is that before training."""
        phi, level = memory.get("phi", self.threshold), memory.get("level")
        if level is None:
            return {**memory, "phi": phi, "level": loss}
        if loss < level + self.tolerance:
            return memory
        return {**memory, "phi": min(phi + RAISE, 1.0), "level": loss}
