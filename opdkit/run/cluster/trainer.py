"""One process of the trainers on a cluster: told its rank as torchrun tells it, it does the run as
any other process does.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from opdkit.base.errors import UserError
from opdkit.base.interrupt import EndedElsewhere, status
from opdkit.run.cluster.actors import EVERY, Actor, here, named
from opdkit.run.cluster.board import Teller
from opdkit.run.cluster.crew import Crew
from opdkit.run.cluster.sampler import CrewSampler
from opdkit.run.cluster.settings import RayCluster
from opdkit.run.cluster.teacher import Teachers
from opdkit.run.launch import execute
from opdkit.run.open import Given
from opdkit.run.settings import Run
from opdkit.sampling.settings import SamplerContext
from opdkit.types import Sampler

SAMPLER = "sampler-"  # what the names of samplers begin with: one that has such a name joins
DONE, REFUSED, STOPPED, FAILED, ELSEWHERE = "done", "refused", "stopped", "failed", "elsewhere"


@dataclass(frozen=True)
class Task:
    """A run as its trainers are given it."""

    run: Run
    cluster: RayCluster
    ranks: int
    address: str  # of the first, for the others
    port: int
    board: Actor
    teachers: Sequence[Sequence[Actor]]  # of each place the process that works, and spares
    samples: bool  # whether the cluster's samplers write
    restarts: int  # of the trainers so far
    resume: bool
    overwrite: bool
    allow_changes: bool


@dataclass(frozen=True)
class End:
    """How a process ended: `how`, and what there is to say of it."""

    how: str
    said: str = ""
    status: int = 0


class TrainerActor:
    """One rank, in its process."""

    def address(self) -> tuple[str, str, int]:
        """Its machine, that machine's address, and a port that is free there."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return *here(), int(probe.getsockname()[1])

    def train(self, task: Task, rank: int) -> End:
        """The run from its start, or from its newest checkpoint, to its end."""
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": "0",  # the one GPU that this process sees
            "WORLD_SIZE": str(task.ranks),
            "MASTER_ADDR": task.address,
            "MASTER_PORT": str(task.port),
        }
        board = task.board
        streams = [Teller(partial(board.ask, "say", name)) for name in ("out", "err")]
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]), _stopped_by(board):
            try:
                parts = Parts(task, rank)
                result = execute(
                    task.run,
                    parts.given(),
                    resume=task.resume,
                    overwrite=task.overwrite,
                    allow_changes=task.allow_changes,
                )
                return End(DONE, f"model   {result.model}\nreport  {result.report}")
            except UserError as error:
                return End(REFUSED, str(error), 2)
            except EndedElsewhere as end:
                return End(ELSEWHERE, status=int(str(end.code)))
            except KeyboardInterrupt as stop:
                return End(STOPPED, status=status(stop))
            except BaseException as error:
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                return End(FAILED, f"{said}\n{traceback.format_exc()}", 1)


@contextmanager
def _stopped_by(board: Actor) -> Iterator[None]:
    """Within it a signal that the board is told of comes to this process, as from the system."""
    usual = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray has a handler of its own
    ended = threading.Event()

    def listen() -> None:
        with suppress(Exception):  # whoever started the run is gone, and Ray ends this process
            while not ended.wait(EVERY):
                if number := board("stopping"):
                    os.kill(os.getpid(), number)
                    return

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that comes now finds the run ended
        signal.signal(signal.SIGTERM, usual)


_UNUSED = (
    ", and none of them holds anything: they hold models that only score, and this run has none, "
    "asks servers, or lets the trainers hold what it needs (evaluate.teacher, teachers with "
    "tokenizers of their own). They take room and do nothing: set cluster.teachers=0"
)


class Parts:
    """The parts of a run that are elsewhere, as one process of the trainers asks them."""

    def __init__(self, task: Task, rank: int):
        self.task = task
        self.teachers = Teachers(task.teachers, task.cluster.patience) if task.teachers else None
        self.crew: Crew | None = None
        self.told = False  # that none of them holds anything

    def given(self) -> Given:
        # a teacher that is evaluated writes, in this process
        evaluated = self.task.run.evaluate is not None and self.task.run.evaluate.teacher
        return Given(
            sampler=self.sampler if self.task.samples else None,
            hosts=None if self.teachers is None or evaluated else self.teachers.hosted,
            others=(self,),
        )

    def sampler(self, context: SamplerContext) -> Sampler:
        cluster = self.task.cluster
        return CrewSampler(context, self._crew, cluster.parts * cluster.samplers)

    def _crew(self) -> Crew:
        def find() -> dict[str, Actor]:
            return {name.removeprefix(SAMPLER): a for name, a in named(SAMPLER).items()}

        self.crew = Crew(find, self.task.cluster.patience)
        return self.crew

    def counts(self) -> dict[str, float]:
        """What they did so far, for metrics."""
        if self.teachers is not None and not self.teachers.specs and not self.told:
            print(f"opdkit: cluster.teachers={len(self.teachers.seats)}{_UNUSED}", file=sys.stderr)
            self.told = True
        made = {"cluster/trainer_restarts": float(self.task.restarts)}
        for part in (self.crew, self.teachers):
            made |= {} if part is None else part.counts()
        return made

    def spans(self) -> list[Any]:
        """When they did what, for the timeline."""
        parts = [part for part in (self.crew, self.teachers) if part is not None]
        return [span for part in parts for span in part.spans()]
