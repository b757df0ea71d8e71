"""The folder of a run: one writer, nothing left by a start that fails, and what an earlier run left
stays until a new one has taken its first step.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.base.config import plain
from opdkit.base.errors import UserError
from opdkit.base.files import PARTIAL, tidy
from opdkit.base.launched import processes, rank
from opdkit.base.lock import locked
from opdkit.run.settings import Run
from opdkit.train.checkpoint import checkpoints
from opdkit.train.mesh import Mesh

RUN = "run.yaml"  # the first file of a run, and the last that goes
OWN = (
    *("metrics.jsonl", "evals.jsonl", "samples", "model", "summary.json", "report.html"),
    *("origin.jsonl", "timeline.jsonl"),
    *("tensorboard", "wandb", "wandb_id.txt", "trackio_id.txt"),
)
FORMER = ".former-run"  # what an earlier run left, while a new one has not taken its first step
MOVING = ".moving-run"  # the same on its way there or back
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # of a disk


@dataclass
class Claim:
    """A folder that is this run's alone."""

    folder: Path
    begun: bool  # whether what is in it stays, whatever happens

    def begin(self) -> None:
        """The first step is done: the run stays, and what an earlier one left goes."""
        if not self.begun:
            self.begun = True
            shutil.rmtree(self.folder / FORMER, ignore_errors=True)


@contextmanager
def claimed(run: Run, *, resume: bool = False, overwrite: bool = False) -> Iterator[Claim]:
    """The folder for a run, before anything is loaded; an error where it is taken.

    A run that ends before its first step leaves it as it was.
    """
    folder = run.folder
    with locked(folder):
        _recover(folder)
        _refuse_taken(folder, resume, overwrite)
        claim = Claim(folder, begun=resume and bool((folder / RUN).exists() or checkpoints(folder)))
        if not claim.begun:
            _refuse_reading(folder, plain(run))
            _set_aside(folder)
        try:
            yield claim
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"a file in {folder} could not be written ({error.strerror}). Checkpoints that are "
                "there are whole: free some space, then continue with --resume"
            ) from error
        finally:
            if not claim.begun:
                _restore(folder)
            tidy(folder)


def refuse_several() -> None:
    """Started once for each of several devices, as by torchrun: the same run so many times."""
    if processes() > 1:
        raise UserError(
            f"this was started as one of {processes()} processes (WORLD_SIZE={processes()}, "
            f"RANK={rank()}), as torchrun does, and only `opdkit train` is work for several: it "
            "would be done so many times over, into one folder. Start it without torchrun, or "
            "unset WORLD_SIZE"
        )


def refuse_apart(folder: Path, mesh: Mesh) -> None:
    """Several processes write one folder: on several machines it must be one that all of them
    see.
    """
    if mesh.size == 1:
        return
    mark = folder / mesh.same(f"{PARTIAL}seen-{os.getpid()}-{time.time_ns()}")
    if mesh.rank == 0:
        mark.touch()
    mesh.every(None)
    seen = mesh.every(mark.exists())
    if mesh.rank == 0:
        mark.unlink()
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} does not see what the first writes into {folder}, and "
            "each writes its part of a checkpoint there: choose an output folder that all machines "
            "share"
        )


def own(folder: Path) -> list[Path]:
    """What runs write in a folder, run.yaml last."""
    names = [folder / name for name in (*OWN, RUN)]
    return [*checkpoints(folder), *(path for path in names if path.exists())]


def _holds(path: Path) -> bool:
    """Whether there is something in a file or folder."""
    return bool(path.stat().st_size) if path.is_file() else any(path.iterdir())


def _stepped(folder: Path) -> bool:
    """Whether a run in it has taken a step."""
    path = folder / "metrics.jsonl"
    return path.exists() and _holds(path)


def _refuse_taken(folder: Path, resume: bool, overwrite: bool) -> None:
    there = own(folder)
    foreign = next((p for p in there if _holds(p)), None)
    known = (folder / RUN).exists() or (resume and checkpoints(folder))
    if foreign is not None and not known:
        raise UserError(
            f"{folder} holds {foreign.name}, and no run that wrote it (there is no {RUN}): this "
            "run would write over it. Choose another output=DIR, or move it away"
        )
    steps = _stepped(folder) or checkpoints(folder) or (folder / "model").exists()
    if steps and not (resume or overwrite):
        raise UserError(
            f"{folder} already holds a run: continue it with --resume, replace it with "
            "--overwrite, or choose another output=DIR"
        )


def _refuse_reading(folder: Path, settings: Any) -> None:
    """A student, teacher or data set that would be gone with the run that is replaced."""
    going = [path.resolve() for path in own(folder) if path.name != RUN]
    for text in _texts(settings) if going else ():
        path = Path(text).expanduser().resolve()
        if any(path == g or g in path.parents for g in going):
            raise UserError(
                f"the run reads {text}, which is part of the run in {folder} that it replaces: "
                "copy it to another place first, or choose another output=DIR"
            )


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested settings that may be a path."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str) and "\n" not in value and len(value) < 1000:
        yield value.partition(".py:")[0]


# --------------------------------------------------------------------- what an earlier run has left


def _set_aside(folder: Path) -> None:
    """Everything of an earlier run, in one hidden folder, until the first step."""
    there = own(folder)
    if not there:
        return
    (folder / MOVING).mkdir()
    for path in there:
        os.replace(path, folder / MOVING / path.name)
    os.replace(folder / MOVING, folder / FORMER)


def _restore(folder: Path) -> None:
    """The folder as it was: what this run wrote goes, what an earlier one left returns."""
    for path in own(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if (folder / FORMER).exists():
        os.replace(folder / FORMER, folder / MOVING)
        _move_back(folder)


def _move_back(folder: Path) -> None:
    for path in list((folder / MOVING).iterdir()):
        os.replace(path, folder / path.name)
    (folder / MOVING).rmdir()


def _recover(folder: Path) -> None:
    """What a killed run left half done."""
    tidy(folder)
    if (folder / MOVING).exists():
        _move_back(folder)
    if (folder / FORMER).exists():
        if _stepped(folder):
            shutil.rmtree(folder / FORMER, ignore_errors=True)
        else:
            _restore(folder)
