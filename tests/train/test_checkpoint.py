"""A checkpoint is complete or not there; the newest whole one is found, damage is named, and only
the old are removed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.objective import Around, Companions, ValueHead
from opdkit.train import checkpoint as checkpoints
from opdkit.train.checkpoint import State, newest, prune, put, restore, save, verify
from opdkit.train.settings import Optim
from opdkit.train.student import Student
from tests.common.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def student() -> Student:
    """After one optimiser step."""
    student = Student(tiny_model(hidden=16, layers=1), Optim(), 1e-3, 10)
    for p in student.parameters:
        p.grad = torch.ones_like(p)
    student.step()
    return student


STATE = State(
    step=3,
    stream={"seed": 1, "epoch": 0, "position": 6, "size": 9},
    memory={"pass_rate": {"a": 1 / 3}},
    best=0.1,
    best_step=2,
)


def test_what_was_saved_is_restored(tmp_path: Path, student: Student, tokenizer: Any) -> None:
    path = save(tmp_path, STATE, student, tokenizer)
    assert path == newest(tmp_path) == tmp_path / "checkpoint-3"
    again = Student(tiny_model(hidden=16, layers=1), Optim(), 1e-3, 10)
    state = restore(path, again)
    assert state == STATE and (state.updates, again.updates) == (1, 1)
    moments, expected = (
        again.optimiser.state_dict()["state"],
        student.optimiser.state_dict()["state"],
    )
    assert all(
        torch.equal(moments[i][k], expected[i][k])
        for i in expected
        for k in ("exp_avg", "exp_avg_sq", "step")
    )


def critic(rate: float = 0.1) -> Companions:
    around = Around(lambda model: 4, torch.device("cpu"), torch.float32)
    return Companions.build([ValueHead(rate)], around)


def test_what_stands_beside_the_student_has_its_own_file(
    tmp_path: Path, student: Student, tokenizer: Any
) -> None:
    mine = critic()
    with torch.no_grad():
        mine.parameters[0].fill_(0.25)
    path = save(tmp_path, STATE, student, tokenizer, mine)
    assert "companions.pt" in json.loads((path / "manifest.json").read_text())
    again = critic()
    restore(path, student, again)
    assert again.parameters[0].tolist() == [[0.25] * 4]
    (path / "companions.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-3 is damaged: companions.pt is missing"):
        newest(tmp_path)


def test_the_state_of_another_method_is_refused(
    tmp_path: Path, student: Student, tokenizer: Any
) -> None:
    """Of other arguments, where there was none, and where there is none now."""
    plain = save(tmp_path / "plain", STATE, student, tokenizer)
    assert not (plain / "companions.pt").exists()
    own = save(tmp_path / "own", STATE, student, tokenizer, critic())
    for path, mine in ((plain, critic()), (own, critic(0.2)), (own, None)):
        with pytest.raises(UserError, match=r"checkpoint-3 cannot be continued: it holds .*method"):
            restore(path, student, mine)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no manifest"])
def test_damage_is_named(tmp_path: Path, student: Student, tokenizer: Any, damage: str) -> None:
    path = save(tmp_path, STATE, student, tokenizer)
    verify(path)
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(content[:-1])
        said = f"model.safetensors has {len(content) - 1} bytes instead of {len(content)}"
    elif damage == "changed":
        content[-1] ^= 1
        weights.write_bytes(content)
        said = "model.safetensors is not what was written"
    elif damage == "missing":
        weights.unlink()
        said = "model.safetensors is missing"
    else:
        (path / "manifest.json").unlink()
        said = "its manifest cannot be read"
    with pytest.raises(UserError, match=f"checkpoint-3 is damaged: {said}"):
        newest(tmp_path)


def test_the_newest_is_the_one_of_most_steps_not_of_the_last_letter(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        put(tmp_path / f"checkpoint-{step}", checkpoints._finish)
    (tmp_path / "checkpoint-old").mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [4]), (2, None, [3, 4]), (1, 2, [2, 4]), (0, 4, [4]), (9, 1, [1, 2, 3, 4])],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, keep, best)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in left]


def write(text: str) -> Any:
    return lambda folder: (folder / "file").write_text(text)


def test_a_failed_write_leaves_the_former_folder_and_nothing_else(tmp_path: Path) -> None:
    final = tmp_path / "model"
    put(final, write("first"))

    def fails(folder: Path) -> None:
        write("second")(folder)
        raise RuntimeError("file write failed")  # as torch says when a disk is full

    with pytest.raises(
        UserError, match=r"model could not be written \(RuntimeError: file write failed\)"
    ):
        put(final, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (
        final / "file"
    ).read_text() == "first"
    put(final, write("second"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (
        final / "file"
    ).read_text() == "second"


def test_killed_between_the_two_moves_of_a_replacement_the_former_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends after the former folder was moved away and before the new one took its
    place.
    """
    final = tmp_path / "checkpoint-3"
    put(final, write("first"))

    class Killed(BaseException):
        pass

    moves: list[Any] = []
    real = os.replace

    def replace(a: Path, b: Path) -> None:
        if moves:
            raise Killed
        moves.append((a, b))
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            put(final, write("second"))
    assert not final.exists()
    checkpoints.tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"] and (
        final / "file"
    ).read_text() == "first"
