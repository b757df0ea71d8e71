"""A run on a cluster, from where it was started: its parts are placed and watched, trainers that
die are started again from the newest checkpoint.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from opdkit.base.errors import UserError
from opdkit.base.interrupt import stoppable
from opdkit.run.cluster.actors import EVERY, Actor, Bundle, Cluster, got
from opdkit.run.cluster.board import Board
from opdkit.run.cluster.sampler import SamplerActor
from opdkit.run.cluster.settings import RayCluster
from opdkit.run.cluster.teacher import TeacherActor
from opdkit.run.cluster.trainer import (
    DONE,
    ELSEWHERE,
    FAILED,
    REFUSED,
    SAMPLER,
    STOPPED,
    End,
    Task,
    TrainerActor,
)
from opdkit.run.folder import FORMER, MOVING, RUN
from opdkit.run.processes import GRACE
from opdkit.run.resolve import placed
from opdkit.run.settings import Run
from opdkit.teachers.pool import Gone
from opdkit.train.checkpoint import checkpoints

SPARE = 0.01  # of what a teacher takes: its spare needs none of it while it waits
DIED = "died"  # how a process ended that could say no more


def drive(
    run: Run, cluster: RayCluster, *, resume: bool, overwrite: bool, allow_changes: bool
) -> Run:
    """Trains a run on a cluster of Ray; returns it with its folder.

    A signal ends the trainers at the end of a step, saved; a second one ends all at once.
    """
    run = placed(run, resume)
    with stoppable(), _started(run, cluster) as started:
        _Driver(run, cluster, started, _Folder(run, resume, overwrite, allow_changes)).train()
    return run


# ---------------------------------------------------------------------------------------- placement


@dataclass
class Started:
    """The parts of a run on its cluster."""

    cluster: Cluster
    board: Actor
    samplers: list[Actor]
    teachers: list[list[Actor]]  # of each place the process that works, and a spare


@contextmanager
def _started(run: Run, settings: RayCluster) -> Iterator[Started]:
    """Room for all parts, and those of them that outlive trainers."""
    usual = bundles(run, settings, gpu=False)
    late = settings.late_samplers * CPU["sampler"]
    cpus = sum(bundle["CPU"] for bundle in usual.values()) + late
    name = "opdkit-" + hashlib.sha256(run.output.encode()).hexdigest()[:12]
    cluster = Cluster(settings.address, name, cpus)
    try:
        gpu = _on_gpus(run, cluster.gpus)
        parts = bundles(run, settings, gpu)
        cluster.reserve(parts, settings.patience)
        board = cluster.start(Board, (), "board")
        yield Started(
            cluster,
            board,
            list(_samplers(run, settings, cluster, parts, gpu)),
            [list(_teacher(run, settings, cluster, parts[p], p)) for p in _of("teacher", parts)],
        )
    finally:
        cluster.close()


CPU = {"trainer": 1.0, "sampler": 0.5, "teacher": 0.5}  # of the machine's, where there is no GPU


def bundles(run: Run, settings: RayCluster, gpu: bool) -> dict[str, Bundle]:
    """What each part of a run takes, by name."""
    counts = {
        "trainer": settings.trainers,
        "sampler": 0 if run.sampler_settings.elsewhere else settings.samplers,
        "teacher": settings.teachers,
    }
    return {
        f"{kind}-{i}": {"CPU": 1.0, "GPU": 1.0} if gpu else {"CPU": CPU[kind]}
        for kind, count in counts.items()
        for i in range(count)
    }


def _of(kind: str, parts: Mapping[str, Bundle]) -> list[str]:
    return [name for name in parts if name.startswith(kind)]


def _on_gpus(run: Run, there: float) -> bool:
    """Whether parts have a GPU each."""
    if run.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"device={run.device} names one device, and on a cluster each part of a run has its "
            "own, which the cluster chooses: set device to auto, cuda or cpu"
        )
    if run.device == "cuda" and not there:
        raise UserError(
            "device=cuda, and no machine of the cluster has a GPU that Ray knows of: see `ray "
            "status`, or set device=auto"
        )
    return run.device != "cpu" and there > 0


def _samplers(
    run: Run, settings: RayCluster, cluster: Cluster, parts: Mapping[str, Bundle], gpu: bool
) -> Iterator[Actor]:
    for name in _of("sampler", parts):
        yield cluster.start(SamplerActor, (run,), SAMPLER + name.rpartition("-")[2], place=name,
                            again=True)  # fmt: skip
    take = {"CPU": 1.0, "GPU": 1.0} if gpu else {"CPU": CPU["sampler"]}
    late = settings.late_samplers if _of("sampler", parts) else 0
    for number in range(settings.samplers, settings.samplers + late):
        yield cluster.start(SamplerActor, (run,), f"{SAMPLER}{number}", take=take, again=True)


def _teacher(
    run: Run, settings: RayCluster, cluster: Cluster, whole: Bundle, place: str
) -> Iterator[Actor]:
    """The process that holds a teacher, and its spare in the same room."""
    shares = [1 - SPARE, SPARE] if settings.spare_teachers else [1.0]
    for share, name in zip(shares, (place, f"{place}-spare")):
        take = {kind: round(amount * share, 4) for kind, amount in whole.items()}
        yield cluster.start(TeacherActor, (run,), name, place=place, take=take, again=True)


# --------------------------------------------------------------------------------------------- runs


@dataclass
class _Folder:
    """The run's folder, and with which flags a run goes on there."""

    run: Run
    resume: bool
    overwrite: bool
    allow_changes: bool

    def __post_init__(self) -> None:
        self.before = self._written()

    def _written(self) -> int | None:
        path = self.run.folder / RUN
        return path.stat().st_mtime_ns if path.exists() else None

    def flags(self) -> dict[str, bool]:
        """A run that has taken a step is resumed; one that has not is begun as it was."""
        folder = self.run.folder
        aside = (folder / FORMER).exists() or (folder / MOVING).exists()
        begun = self.resume or (not aside and self._written() != self.before)
        return {
            "resume": begun,
            "overwrite": self.overwrite and not begun,
            "allow_changes": self.allow_changes,
        }


class _Driver:
    """The trainers of a run, started, watched and started again."""

    def __init__(self, run: Run, settings: RayCluster, started: Started, folder: _Folder):
        self.run, self.settings, self.started, self.folder = run, settings, started, folder
        self.restarts = 0
        self.stop: KeyboardInterrupt | None = None

    def train(self) -> None:
        """To the run's end; its error, where it has one, is raised here."""
        before: Any = None
        while True:
            end = self._once()
            if end.how == DONE:
                return
            if end.how == REFUSED:
                raise UserError(end.said)
            if self.stop is not None or end.how == STOPPED:
                raise self.stop or KeyboardInterrupt
            said, _, trace = end.said.partition("\n")
            # an error that comes again at the same place would come each time
            now = end.how, said, checkpoints(self.run.folder)
            again = end.how == FAILED and now == before
            if again or self.restarts == self.settings.restarts:
                told = (
                    f"{said}. The trainers have been started again {self.restarts} times "
                    f"(cluster.restarts={self.settings.restarts}). What was learnt up to the "
                    "newest checkpoint is kept: continue with --resume"
                )
                if end.how == FAILED:
                    raise RuntimeError(told) from RuntimeError(trace)
                raise UserError(told)
            before = now
            self.restarts += 1
            self._tell(
                f"opdkit: {said}: the trainers are started again from the newest checkpoint "
                f"({self.restarts} of {self.settings.restarts})"
            )

    def _once(self) -> End:
        """The trainers from their start to their end, which is that of the first that failed."""
        ranks = self.settings.trainers
        trainers = [
            self.started.cluster.start(
                TrainerActor, (), f"trainer-{rank}-{self.restarts}", place=f"trainer-{rank}"
            )
            for rank in range(ranks)
        ]
        try:
            try:
                _, address, port = got(trainers[0].ask("address"), self.settings.patience)
                task = self._task(address, port)
                calls = [trainer.ask("train", task, rank) for rank, trainer in enumerate(trainers)]
            except Gone as error:
                return End(DIED, f"the first trainer did not start ({error})")
            except TimeoutError:
                raise UserError(
                    f"the first trainer did not start within {self.settings.patience:g} s: its "
                    "machine is gone or very busy, and no other has room. See `ray status`, or "
                    "raise cluster.patience; then continue with --resume"
                ) from None
            ends = self._watched(calls)
        finally:
            for trainer in trainers:
                trainer.end()
            self._lines()
        # what says why, before those that only lost the others
        order = (REFUSED, STOPPED, FAILED, DIED, ELSEWHERE, DONE)
        worst = min(ends, key=lambda end: order.index(end.how))
        if worst.how == ELSEWHERE:
            return End(DIED, "the trainers lost each other")
        return next(end for end in ends if end.how == worst.how)

    def _task(self, address: str, port: int) -> Task:
        local = self.settings.trainers == 1
        return Task(
            self.run,
            self.settings,
            self.settings.trainers,
            "127.0.0.1" if local else address,
            port,
            self.started.board,
            self.started.teachers,
            bool(self.started.samplers),
            self.restarts,
            **self.folder.flags(),
        )

    def _watched(self, calls: Sequence[Any]) -> list[End]:
        """How each ended; once one has failed, the others have a moment to end by themselves. Those
        that were stopped are waited for: the first may still be saving the run.
        """
        ends: dict[int, End] = {}
        failed: float | None = None
        while len(ends) < len(calls):
            try:
                for rank in [r for r in range(len(calls)) if r not in ends]:
                    with suppress(TimeoutError):
                        ends[rank] = self._end(rank, calls[rank])
                self._lines()
                bad = any(end.how not in (DONE, STOPPED) for end in ends.values())
                if failed is None and bad:
                    failed = time.monotonic()
                if failed is not None and time.monotonic() - failed > GRACE:
                    break
                time.sleep(EVERY)
            except KeyboardInterrupt as stop:
                if self.stop is not None:
                    raise
                self.stop = stop
                self.started.board("stop", signal.SIGTERM)
        return list(ends.values())

    def _end(self, rank: int, call: Any) -> End:
        """How a trainer ended; TimeoutError: it has not."""
        try:
            return got(call, timeout=0)
        except TimeoutError:
            raise
        except Gone:
            return End(DIED, f"trainer {rank} died")

    def _lines(self) -> None:
        """What the trainers have said meanwhile."""
        with suppress(Gone):
            for stream, text in self.started.board("read"):
                print(text, end="", file=sys.stdout if stream == "out" else sys.stderr)

    def _tell(self, text: str) -> None:
        print(text, file=sys.stderr)
