"""A run folder: one writer, nothing left by a start that fails, and what an earlier run left stays
until a new one has taken its first step.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import opdkit
from opdkit import UserError, distill
from opdkit.base.lock import locked
from opdkit.run import folder as folders
from opdkit.run.cache_teacher import cache_teacher
from opdkit.run.folder import FORMER, MOVING, claimed
from opdkit.run.launch import execute
from opdkit.train.record import Recorder
from opdkit.types import Sampling
from tests.end_to_end.conftest import Shop
from tests.end_to_end.crash import in_child, left_by


@pytest.fixture(scope="module")
def finished(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    execute(shop.run(out))
    return out


def copied(finished: Path, to: Path) -> dict[str, bytes]:
    """A copy of the finished run, and its files."""
    import shutil

    shutil.copytree(finished, to)
    return contents(to)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FAILING: dict[str, dict[str, Any]] = {  # each fails later than the one before
    "a method that is not there": {"method": "opdd"},
    "a student that is not there": {"student": "/nowhere/student"},
    "no row": {"data": "/nowhere/data.jsonl"},
    "a prompt too long": {"sampling": {"max_completion_length": 10**6}},
    "a judge that is not there": {"reward": "{judge}"},
    "a reward that fails in the first step": {"reward": "{broken}"},
}


def failing(shop: Shop, tmp_path: Path, case: str) -> dict[str, Any]:
    broken, judge = tmp_path / "broken.py", tmp_path / "judge.yaml"
    broken.write_text("def reward(rollout):\n    raise ValueError('no')\n")
    judge.write_text("urls: [http://127.0.0.1:9/v1]\nretries: 0\n")

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: filled(v) for k, v in value.items()}
        known = {"{data}": shop.data, "{broken}": f"{broken}:reward", "{judge}": f"judge:{judge}"}
        return known.get(value, value) if isinstance(value, str) else value

    return filled(FAILING[case])


@pytest.mark.parametrize("case", FAILING)
def test_a_start_that_fails_leaves_no_folder_and_an_earlier_run_as_it_was(
    shop: Shop, tmp_path: Path, finished: Path, case: str
) -> None:
    settings = failing(shop, tmp_path, case)
    with pytest.raises(Exception):  # noqa: B017
        execute(shop.run(tmp_path / "new" / "run", **settings))
    assert not (tmp_path / "new").exists()
    before = copied(finished, tmp_path / "old")
    with pytest.raises(Exception):  # noqa: B017
        execute(shop.run(tmp_path / "old", **settings), overwrite=True)
    assert contents(tmp_path / "old") == before


def test_own_files_in_a_folder_stay_when_a_start_fails(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    shop.run(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(shop.run(tmp_path, method="opdd").yaml())
    before = contents(tmp_path)
    with pytest.raises(UserError):
        execute(shop.run(tmp_path, method="opdd"))
    assert contents(tmp_path) == before


def test_overwriting_takes_the_earlier_run_away_after_the_first_step(
    shop: Shop, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(finished, tmp_path / "run")
    seen = []
    real = Recorder.step

    def step(self: Recorder, *args: Any) -> None:
        seen.append((tmp_path / "run" / FORMER / "model").exists())
        real(self, *args)

    monkeypatch.setattr(Recorder, "step", step)
    with pytest.raises(UserError, match="already holds a run"):
        execute(shop.run(tmp_path / "run", seed=1))
    execute(shop.run(tmp_path / "run", seed=1), overwrite=True)
    assert seen == [True, False]
    fresh = shop.run(tmp_path / "fresh", seed=1)
    execute(fresh)
    assert left_by(tmp_path / "run") == left_by(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("moment", "back"), [("before recording", True), ("after recording", False)]
)
def test_killed_while_it_replaces_a_run(
    shop: Shop, tmp_path: Path, finished: Path, moment: str, back: bool
) -> None:
    """Before its first step is recorded the earlier run returns; afterwards it is this one."""
    before = copied(finished, tmp_path / "run")
    values = shop.values(tmp_path / "run", seed=1)
    assert in_child(values, moment=moment, step=1, overwrite=True) == -9
    assert (tmp_path / "run" / FORMER).exists() is True or not back
    with claimed(shop.run(tmp_path / "run"), resume=True):
        pass
    assert not (tmp_path / "run" / FORMER).exists()
    assert (contents(tmp_path / "run") == before) is back


@pytest.mark.parametrize("call", range(12))
def test_killed_at_any_move_of_setting_aside_and_back_nothing_is_lost(
    shop: Shop, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The process ends before its move number `call`, of there and back."""
    before = copied(finished, tmp_path / "run")

    class Killed(BaseException):
        pass

    moves = 0

    def replace(a: Any, b: Any) -> None:
        nonlocal moves
        moves += 1
        if moves > call:
            raise Killed
        real(a, b)

    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", replace)
        with pytest.raises(Killed):
            folders._set_aside(tmp_path / "run")
            (tmp_path / "run" / "run.yaml").write_text("of the new run")
            folders._restore(tmp_path / "run")
    folders._recover(tmp_path / "run")
    assert contents(tmp_path / "run") == before
    assert not any((tmp_path / "run" / name).exists() for name in (FORMER, MOVING))


def test_a_start_that_was_killed_is_no_run_to_keep(shop: Shop, tmp_path: Path) -> None:
    values = shop.values(tmp_path / "run")
    assert in_child(values, moment="sampling", step=1) == -9
    assert (tmp_path / "run" / "run.yaml").exists()
    assert in_child({**values, "seed": 3}) == 0


def test_files_that_no_run_wrote_are_not_written_over(shop: Shop, tmp_path: Path) -> None:
    for name in ("model/config.json", "metrics.jsonl", "checkpoint-3/x", "samples/x"):
        out = tmp_path / name.partition("/")[0]
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"and no run that wrote it .* would write over it"):
                execute(shop.run(out), overwrite=overwrite)
        assert (out / name).read_text() == "mine"


def test_what_a_run_reads_is_not_removed_with_the_run_that_it_replaces(
    shop: Shop, tmp_path: Path, finished: Path
) -> None:
    before = copied(finished, tmp_path / "run")
    run = shop.run(tmp_path / "run", student=str(tmp_path / "run" / "model"))
    with pytest.raises(UserError, match=r"the run reads .*model, which is part of the run in"):
        execute(run, overwrite=True)
    assert contents(tmp_path / "run") == before


def test_one_writer(shop: Shop, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on "):
        execute(shop.run(tmp_path))


def test_only_training_is_work_for_several_processes(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"one of 2 processes \(WORLD_SIZE=2, RANK=1\)"):
        cache_teacher(shop.run(tmp_path / "run"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    execute(shop.run(tmp_path / "run"))


@pytest.mark.parametrize("where", ["metrics", "samples", "report"])
def test_a_full_disk_is_told(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In the second step, or at the end; continued, it is the run that never was without room."""
    import errno

    from opdkit.run import launch
    from opdkit.train.track import JsonLines

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = shop.run(tmp_path / "run", sample_every=2, checkpoint={"every": 1})
    owner, name = {
        "metrics": (JsonLines, "log"),
        "samples": (Recorder, "samples"),
        "report": (launch, "write_report"),
    }[where]
    real = getattr(owner, name)
    calls = 0

    def second(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return full() if calls == 2 or where == "report" else real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, second)
        with pytest.raises(UserError, match=r"No space left on device.*free some space.*--resume"):
            execute(run)
    execute(run, resume=True)
    execute(shop.run(tmp_path / "whole", sample_every=2, checkpoint={"every": 1}))
    assert left_by(tmp_path / "run") == left_by(tmp_path / "whole")


def test_paths_are_read_as_paths(shop: Shop, tmp_path: Path) -> None:
    out = distill(
        Path(shop.student),
        Path(shop.teacher),
        Path(shop.data),
        output=tmp_path / "run",
        steps=1,
        prompts_per_step=2,
        sampling__max_completion_length=4,
        device="cpu",
    )
    assert out.folder == tmp_path / "run" and out.model.exists()
    short = Sampling(max_completion_length=4)
    assert len(opdkit.sample_model(out.model, Path(shop.data), short)) == 6
    assert opdkit.eval_model(out.model, Path(shop.data), sampling=short).n_problems == 6


def test_an_estimate_ends_no_run(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from opdkit.run import launch

    def fails(*args: Any) -> Any:
        raise KeyError("no such model")

    monkeypatch.setattr(launch, "use_of", fails)
    assert len(execute(shop.run(tmp_path / "a")).metrics) == 2
    monkeypatch.setattr(launch, "use_of", lambda run: fails)
    assert len(execute(shop.run(tmp_path / "b")).metrics) == 2
    assert "the use of the device is not logged" in capsys.readouterr().err
