"""Checkpoints that are written beside the loop: what fails is said, what is under way is waited
for, and of several processes all know of it.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from opdkit import UserError
from opdkit.base.files import begin_folder
from opdkit.objective.companion import Companions
from opdkit.train.checkpoint import State
from opdkit.train.mesh import Mesh
from opdkit.train.saver import Saver, Writing, agreed
from opdkit.train.settings import Checkpoint, Optim
from opdkit.train.student import Student
from tests.common.tiny import tiny_model, tiny_tokenizer
from tests.train.test_mesh import on_each


def saver(folder: Path, keep: int = 1) -> Saver:
    student = Student(tiny_model(hidden=16, layers=1), Optim(), 1e-3, 10)
    return Saver(folder, student, tiny_tokenizer(), Companions(), Checkpoint(keep=keep))


def test_one_process_saves_at_once_and_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    mine = saver(tmp_path)
    for step in range(1, 5):
        mine.save(State(step=step, best_step=2 if step >= 2 else None))
        assert mine.running is None and (tmp_path / f"checkpoint-{step}").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def full() -> None:
    raise UserError("checkpoint-1 could not be written")


@pytest.mark.parametrize("end", [None, KeyboardInterrupt])
def test_what_could_not_be_written_is_said_at_the_end(tmp_path: Path, end: type | None) -> None:
    """Also where a signal ends the run, which is told that it was saved."""
    mine = saver(tmp_path)
    with pytest.raises(UserError, match="could not be written"), mine:
        mine.running = Writing(full)
        if end is not None:
            raise end
    assert mine.running is None


def test_a_run_that_fails_says_why_once_its_checkpoint_is_written(tmp_path: Path) -> None:
    written, may = threading.Event(), threading.Event()

    def slowly() -> None:
        may.wait(10)
        written.set()

    mine = saver(tmp_path)
    with pytest.raises(ValueError, match="its own"), mine:
        mine.running = Writing(slowly)
        threading.Timer(0.1, may.set).start()
        raise ValueError("its own")
    assert written.is_set()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_one_process_cannot_write_all_refuse(tmp_path: Path, rank: int) -> None:
    final = tmp_path / "checkpoint-1"
    folder = begin_folder(final)

    def work(mesh: Mesh) -> str:
        def write() -> int:
            if mesh.rank == rank:
                raise OSError("no space left")
            return mesh.rank

        with pytest.raises(UserError, match=r"checkpoint-1 could not be written \(OSError: no sp"):
            agreed(mesh, final, write)
        return "refused"

    assert on_each(3, work) == ["refused"] * 3
    assert not folder.exists() and not final.exists()


def test_what_all_can_do_is_known_to_all(tmp_path: Path) -> None:
    made = on_each(3, lambda mesh: agreed(mesh, tmp_path / "x", lambda: mesh.rank))
    assert made == [[0, 1, 2]] * 3
