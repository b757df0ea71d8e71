"""Rollouts that are asked for some steps before they are learnt from: a fixed lag, so that a
sampler elsewhere writes while the trainer learns.

At step s: take the rollouts of s, give the sampler the weights as they are now, ask for those of
s + ahead, score and learn those of s. What is asked for and not yet learnt from is part of a
checkpoint.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from opdkit.base.clock import Clock, Span
from opdkit.curricula import Memory
from opdkit.curricula.recall import again, kept
from opdkit.train.collect.collect import Collected, collect, prepare
from opdkit.train.collect.collector import Collector
from opdkit.train.mesh import ALONE, Mesh
from opdkit.train.student import Student
from opdkit.types import Rollout


@dataclass(frozen=True)
class Written:
    """The rollouts of a step, and how they came about."""

    collected: Collected
    since: int  # steps that had been done when they were asked for
    seconds: Mapping[str, float] = field(default_factory=dict)  # of each phase, beside the trainer
    spans: tuple[Span, ...] = ()  # when that was


class Queue:
    """The rollouts of the next steps.

    Arguments:
        collector: writes them.
        ahead: steps by which they are asked for before they are learnt from.
        beside: whether they are written while the trainer learns, by a sampler that is elsewhere
            and has `staged`; of several processes the first asks it. Else they are written as they
            are asked for.
    """

    def __init__(
        self, collector: Collector, ahead: int = 0, beside: bool = False, mesh: Mesh = ALONE
    ):
        self.collector, self.ahead, self.beside, self.mesh = collector, ahead, beside, mesh
        self._asked: dict[int, Future[Written]] = {}  # by the step that learns from them
        self._sent: int | None = None  # optimiser steps of the weights that the sampler is given
        self._sending: Future[Any] = Future()
        self._hand = _Hand() if beside and mesh.rank == 0 else None

    def prepared(self, student: Student, memory: Memory) -> Memory:
        """Memory before the first step: see `collect.prepare`."""
        if not self.beside:
            return prepare(self.collector, student, memory)
        self.rest(student)

        def make() -> Memory | None:
            made = prepare(self.collector, student, memory)
            return None if made is memory else made

        made = self.mesh.first(make)
        return memory if made is None else made

    def next(
        self,
        student: Student,
        clock: Clock,
        *,
        step: int,
        steps: int,
        total_steps: int,
        memory: Memory,
    ) -> Written:
        """The rollouts of step number `step` (from 0), those of `step + ahead` being asked for;
        `steps`: that the run has at most, `total_steps`: that it is expected to have.
        """

        def ask(last: int) -> None:
            for number in range(max([step - 1, *self._asked]) + 1, min(last, steps - 1) + 1):
                self._ask(student, clock, number, step, total_steps, memory)

        ask(max(step, step + self.ahead - 1))
        with clock("wait") if self.beside else nullcontext():
            written = self._taken(step)
        ask(step + self.ahead)
        return written

    def _taken(self, step: int) -> Written:
        if not self.beside:
            return self._asked[step].result()
        return self.mesh.first(lambda: self._asked[step].result())

    def _ask(
        self,
        student: Student,
        clock: Clock,
        number: int,
        step: int,
        total_steps: int,
        memory: Memory,
    ) -> None:
        """For the rollouts of step `number`, by the weights before step `step`."""
        if self.beside:
            self._send(student)
            clock = Clock()
        work = partial(
            collect,
            self.collector,
            student.updates,
            clock,
            step=number,
            total_steps=total_steps,
            memory=memory,
        )

        def write() -> Written:
            collected = work()
            if not self.beside:
                return Written(collected, step)
            return Written(collected, step, clock.seconds, tuple(clock.spans))

        self._asked[number] = self._done(write)

    def _done(self, work: Callable[[], Any]) -> Future[Any]:
        """Work done here and now, or handed on; of another process a promise that nobody keeps."""
        if self._hand is not None:
            return self._hand.give(work)
        future: Future[Any] = Future()
        if not self.beside:
            future.set_result(work())
        return future

    def _send(self, student: Student) -> None:
        """The student's weights to the sampler, once those that write with older ones are done."""
        if self._sent == student.updates:
            return
        sampler: Any = self.collector.sampler
        self._sending = self._done(sampler.staged(student.model, student.updates))
        self._sent = student.updates

    def moved(self, student: Student) -> None:
        """After the optimiser steps of a step: a sampler that writes here and now follows."""
        if not self.beside:
            self.collector.sampler.sync(student.model, student.updates)

    def rest(self, student: Student) -> None:
        """The sampler has the student's weights, and nothing is under way."""
        if not self.beside:
            return
        self._send(student)
        self.mesh.first(lambda: self._sending.result())

    def learnt(self, step: int) -> None:
        """Step number `step` is done: its rollouts are needed no more."""
        self._asked.pop(step, None)

    def state(self, step: int) -> list[dict[str, Any]]:
        """The rollouts of step number `step` and those after it, for a checkpoint, waited for; what
        failed is left out, and asked for again by the run that goes on. With `ahead` 0 so is, with
        the same result, what was asked for by the weights before its own step.
        """
        rows: list[dict[str, Any]] = []
        for number in sorted(n for n in self._asked if n >= step):
            find = partial(self._result, number)
            written = self.mesh.first(find) if self.beside else find()
            if written is None or (not self.ahead and written.since == number):
                break
            rows.append({"step": number, "since": written.since} | _plain(written.collected))
        return rows

    def _result(self, number: int) -> Written | None:
        """What was written for a step; None where that failed, which is said."""
        try:
            return self._asked[number].result()
        except Exception as error:
            print(
                f"opdkit: the rollouts of step {number + 1}, asked for ahead, are not kept "
                f"({type(error).__name__}): the run that goes on asks for them again",
                file=sys.stderr,
            )
            return None

    def load(self, rows: list[dict[str, Any]]) -> None:
        """Go on with what `state` gave."""
        for row in rows:
            future: Future[Written] = Future()
            future.set_result(Written(_collected(row), row["since"]))
            self._asked[row["step"]] = future


class _Hand:
    """A thread that does what it is given, one thing after the other."""

    def __init__(self) -> None:
        self._given: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        # a daemon: a run that ends does not wait for rollouts that nobody learns from
        threading.Thread(target=self._work, name="opdkit-ahead", daemon=True).start()

    def give(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._given.put((work, future))
        return future

    def _work(self) -> None:
        failed: BaseException | None = None
        while True:
            work, future = self._given.get()
            try:
                if failed is not None:  # what follows stands on what failed
                    raise failed
                future.set_result(work())
            except BaseException as error:  # is raised where the result is taken
                failed = error
                future.set_exception(error)


def _plain(collected: Collected) -> dict[str, Any]:
    """As plain JSON; a rollout that filters left as it was is its number among the scored."""
    at = {id(rollout): i for i, rollout in enumerate(collected.scored)}
    return {
        "scored": [kept(r) for r in collected.scored],
        "rollouts": [at[id(r)] if id(r) in at else kept(r) for r in collected.rollouts],
        "tokens": collected.tokens,
        "earlier": sorted(collected.earlier),
        "version": collected.version,
        "stream": collected.stream,
        "counts": collected.counts,
    }


def _collected(row: Mapping[str, Any]) -> Collected:
    scored = [again(values) for values in row["scored"]]
    rollouts: list[Rollout] = [
        scored[which] if isinstance(which, int) else again(which) for which in row["rollouts"]
    ]
    return Collected(
        rollouts,
        scored,
        row["tokens"],
        frozenset(row["earlier"]),
        row["version"],
        row["stream"],
        row["counts"],
    )
