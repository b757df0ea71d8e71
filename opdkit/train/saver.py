"""When and how a run is saved: by one process at once; by several each its own parts, written while
the loop goes on, and given their place once all are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from opdkit.base.files import begin_folder, partial_of, place_folder, tidy
from opdkit.base.launched import GRACE
from opdkit.models.sharding import is_spread, reshard
from opdkit.objective.companion import Companions
from opdkit.train import checkpoint as checkpoints
from opdkit.train import shards
from opdkit.train.checkpoint import State
from opdkit.train.mesh import ALONE, Mesh
from opdkit.train.settings import Checkpoint
from opdkit.train.student import Student

Made = TypeVar("Made")


@dataclass
class Saver:
    """Saves a run, and keeps the newest checkpoints and the best.

    As a context it leaves nothing half written behind: at its end it waits for what is under way.
    """

    folder: Path
    student: Student
    tokenizer: Any
    companions: Companions
    settings: Checkpoint = Checkpoint()
    mesh: Mesh = ALONE
    aside: Mesh | None = field(default=None, init=False)  # of the thread that writes
    running: Writing | None = field(default=None, init=False)

    def save(self, state: State) -> None:
        """A checkpoint of the run as it is now; of several processes all ask for it at once."""
        if not is_spread(self.student.model):
            if self.mesh.rank == 0:
                student, tokenizer = self.student, self.tokenizer
                checkpoints.save(self.folder, state, student, tokenizer, self.companions)
                checkpoints.prune(self.folder, self.settings.keep, state.best_step)
            self.mesh.every(None)  # it is there for all
            return
        self.finish()
        self.aside = self.aside or self.mesh.aside()
        final = self.mesh.same(checkpoints.place_of(self.folder, state))
        parts: dict[str, Tensor] = {}
        reshard(self.student.model)
        beside = shards.apart(self.companions.state_dict(), shards.BESIDE, parts)
        tensors = shards.staged(self.student, parts)
        agreed(self.mesh, final, lambda: self._begin(final, state, beside))
        best = state.best_step
        self.running = Writing(lambda: self._write(final, tensors, state.step == best, best))
        if not self.settings.background:
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written; an error if it could not be."""
        running, self.running = self.running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Saver:
        # now: who waits for a new channel hears of nothing else
        self.aside = self.mesh.aside() if is_spread(self.student.model) else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.finish()
        elif self.running is not None:  # the others wait for this process, and can still write
            self.running.thread.join(GRACE)

    # ---------------------------------------------------------------------- of several processes

    def _begin(self, final: Path, state: State, beside: Mapping[str, Any]) -> None:
        """The first process begins the folder, and writes all that is not in parts."""
        if self.mesh.rank == 0:
            folder = begin_folder(final)
            checkpoints.write_description(folder, self.student.model, self.tokenizer)
            checkpoints.write_state(folder, state, self.student, beside)

    def _write(
        self, final: Path, tensors: dict[str, Tensor], best: bool, best_step: int | None
    ) -> None:
        """In a thread of its own: the parts of every process, tensors [...], then the folder is
        given its place. The best holds Hugging Face weights besides.
        """
        assert self.aside is not None
        mesh, folder = self.aside, partial_of(final)
        first = mesh.rank == 0

        def digested() -> dict[str, Any]:
            if best and first:
                weights = shards.weights_in(folder)
                self.student.model.save_pretrained(folder, state_dict=weights)
            return checkpoints.digests(folder, shards.written_by(folder, mesh.rank))

        def place() -> None:
            if first:
                _refuse_unseen(folder, found)
                checkpoints.write_manifest(folder, found)
                place_folder(final)
                checkpoints.prune(final.parent, self.settings.keep, best_step)

        agreed(mesh, final, lambda: shards.write(folder, tensors, mesh.small))
        tensors.clear()
        every = agreed(mesh, final, digested)
        found = {name: told for files in every for name, told in files.items()}
        agreed(mesh, final, place)


def agreed(mesh: Mesh, final: Path, work: Callable[[], Made]) -> list[Made]:
    """What each process makes on the way to a folder; where one fails, all have its error, and
    nothing of the folder is left.
    """
    why, made = None, None
    try:
        made = work()
    except Exception as error:  # a full disk is of many kinds
        why = f"{type(error).__name__}: {error}"
    every: list[Any] = mesh.every((made, why))
    wrong = next((why for _, why in every if why is not None), None)
    if wrong is None:
        return [made for made, _ in every]
    if mesh.rank == 0:
        tidy(final.parent)
    raise checkpoints.unwritten(final, wrong)


def _refuse_unseen(folder: Path, found: Mapping[str, Any]) -> None:
    """What other processes have written must be there for the first to see."""
    for name in found:
        if not (folder / name).is_file():
            raise OSError(
                f"{name} was written by another process, and the first does not see it: the "
                "output folder has to be one that all machines share"
            )


class Writing:
    """Work in a thread, whose end is waited for later."""

    def __init__(self, work: Callable[[], None]):
        self.work = work
        self.error: BaseException | None = None
        self.thread = Thread(target=self._run, name="opdkit-checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error

    def result(self) -> None:
        """Waits for the end; the error, if there was one."""
        self.thread.join()
        if self.error is not None:
            raise self.error
