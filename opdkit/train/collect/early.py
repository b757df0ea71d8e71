"""Rollouts scored by servers as each of them ends, while others are still being written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from opdkit.base.clock import Span
from opdkit.models.layout import Layout
from opdkit.objective.facts import Fact
from opdkit.objective.head import flat_positions
from opdkit.objective.needs import Needs
from opdkit.objective.supply import with_ids
from opdkit.teachers import Remote
from opdkit.teachers.base import early
from opdkit.teachers.early import MOST, Answer, Begun
from opdkit.train.gather import collate
from opdkit.train.mesh import ALONE, Mesh
from opdkit.types import Rollout

# answers that came before they were asked for, that were read, that failed, that nobody asked for
COUNTS = ("begun", "used", "failed", "discarded")


class Early:
    """Begins what a step will ask of teachers behind servers, rollout by rollout.

    Nothing else depends on it: `gather` takes an answer that it finds for the request that it would
    make, and else makes the request. Begun is what a teacher says of a rollout's tokens and row
    alone (`early`), not what is read at another model's ids. An error of a request that was begun
    is raised in the step that reads it.

    Arguments:
        begun: where the answers wait; those who ask look there.
        scorers: all of the run, by the names that the objective gives them.
        needs: what is read at step number `step` of `total_steps`.
        mesh: the processes that share the run; each begins what is asked about rollouts that it
            hears of.
    """

    def __init__(
        self,
        begun: Begun,
        scorers: Mapping[str, Any],
        needs: Callable[[int, int], Needs],
        mesh: Mesh = ALONE,
    ):
        self.begun, self.scorers, self.needs, self.mesh = begun, scorers, needs, mesh
        self.counts = dict.fromkeys(COUNTS, 0)
        self._spans: dict[int, list[Span]] = {}  # by the step that they are for
        self._said = dict(self.counts)
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for number in range(begun.threads):
            # daemons: a run that ends does not wait for what nobody reads
            threading.Thread(target=self._serve, name=f"early {number}", daemon=True).start()

    def hearing(self, step: int, total_steps: int) -> Callable[[Rollout], None]:
        """What is to be told of each rollout of a step as it ends."""
        asked = asked_of(self.needs(step, total_steps), self.scorers)
        return partial(self._hear, step, self.needs(step, total_steps), asked)

    def settle(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Before a step reads answers: forgets those that no step will read, and hands those about
        its rollouts to the processes that learn from them.
        """
        self.counts["discarded"] += self.begun.discard(step)
        if self.mesh.size == 1:
            return
        owner = {r.id: rank for r, rank in zip(rollouts, self.mesh.owners(rollouts))}
        theirs = self.begun.about({id for id, rank in owner.items() if rank != self.mesh.rank})
        parts: list[dict[bytes, Answer]] = [{} for _ in range(self.mesh.size)]
        for key, answer in theirs.items():
            parts[owner[answer.rollout]][key] = answer
        for mine in self.mesh.handed(parts):
            self.begun.give(mine)

    def metrics(self) -> dict[str, float]:
        """Since they were asked for last: answers that came early, were read, and were not, in all
        processes.
        """
        before, now = self._said, {**self.counts, "used": self.begun.used}
        self._said = now
        every = self.mesh.every([now[name] - before[name] for name in COUNTS])
        return {f"early/{name}": float(sum(of)) for name, of in zip(COUNTS, zip(*every))}

    def spans(self, step: int) -> list[Span]:
        """When teachers were asked for a step before it was taken; they are told once."""
        return self._spans.pop(step, [])

    def _hear(
        self, step: int, needs: Needs, asked: Mapping[str, list[Fact]], rollout: Rollout
    ) -> None:
        models = [model for model in asked if early(self.scorers[model], rollout)]
        if models and self.begun.size < MOST:
            self.begun.expect(rollout.id)
            self._work.put(partial(self._begin, step, needs, asked, models, rollout))

    def _begin(
        self,
        step: int,
        needs: Needs,
        asked: Mapping[str, list[Fact]],
        models: list[str],
        rollout: Rollout,
    ) -> None:
        """Asks each of the models about a rollout; the scorers keep what they hear."""
        with self.begun.begins(rollout.id, step):
            written = Rollout(**{**vars(rollout), "logp": [], "drawn_logp": []})
            batch = collate([written], "cpu", torch.float32)
            positions = flat_positions(batch.by(needs.authors))
            layout, began = Layout([rollout], batch.shape[1]), time.time()
            for model in models if len(positions) else ():
                if asked[model]:
                    self.scorers[model].facts(asked[model], layout, positions, {})
                else:
                    self.scorers[model].source(layout, positions)
            self._spans.setdefault(step, []).append(("score", began, time.time()))

    def _serve(self) -> None:
        while True:
            work = self._work.get()
            try:
                work()
                self.counts["begun"] += 1
            except Exception:  # is the step's, which asks the same
                self.counts["failed"] += 1


def asked_of(needs: Needs, scorers: Mapping[str, Any]) -> dict[str, list[Fact]]:
    """What a step asks of each model before any other has answered: numbers; none for one whose
    whole vocabulary is read. Models of which it reads nothing are left out.
    """
    read = with_ids(needs.facts - needs.of("live"))
    wanted = Needs(frozenset(fact for fact in read if fact.read_from != "rollouts"))
    asked: dict[str, list[Fact]] = {}
    for model in sorted(scorers):
        if not wanted.of(model):
            continue
        if wanted.whole(model) or not isinstance(scorers[model], Remote):
            asked[model] = []
        elif own := [f for f in wanted.facts if f.models[0] == model and not f.others_first]:
            asked[model] = own
    return asked
