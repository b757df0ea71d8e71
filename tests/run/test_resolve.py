"""A run decided and recorded: its folder, paths in full, where it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import opdkit
from opdkit.base.errors import UserError
from opdkit.run.origin import ORIGIN
from opdkit.run.resolve import in_full, resolve
from opdkit.run.settings import load_run, make_run
from tests.common.tiny import save_tiny

RUN = {"student": "s", "teacher": "t", "data": "d", "device": "cpu"}


def test_the_folder_is_the_next_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(RUN | {"method": "tropd(k=4) * iw_opd"})
    assert Path(resolve(run).output) == tmp_path / "runs" / "tropd-iw_opd-001"
    for name in ("tropd-iw_opd-001", "tropd-iw_opd-007", "tropd-002", "tropd-iw_opd-x"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert Path(resolve(run).output).name == "tropd-iw_opd-008"
    assert Path(resolve(run, resume=True).output).name == "tropd-iw_opd-007"
    assert Path(resolve(make_run(RUN | {"output": "x"})).output) == tmp_path / "x"
    with pytest.raises(UserError, match=r"no run runs/gkd-NNN here to resume"):
        resolve(make_run(RUN | {"method": "gkd"}), resume=True)


def test_paths_are_in_full_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s", "c", "rows.jsonl", "mine.py", "prompt"):
        (tmp_path / name).write_text("")
    run = in_full(
        make_run(
            {
                "student": "s",
                "teacher": {"a": "s", "b": "Qwen/Qwen3-4B", "c": "cached:c"},
                "data": {"source": "rows.jsonl", "columns": {"prompt": "prompt"}},
                "method": "mine.py:m * iw_opd",
                "reward": "mine.py:r",
            }
        )
    )
    here = str(tmp_path)
    assert (run.student, run.prompts.source) == (f"{here}/s", f"{here}/rows.jsonl")
    assert run.teacher == {"a": f"{here}/s", "b": "Qwen/Qwen3-4B", "c": f"cached:{here}/c"}
    assert (run.method, run.reward) == (f"{here}/mine.py:m * iw_opd", f"{here}/mine.py:r")
    assert run.prompts.columns == {"prompt": "prompt"}
    assert in_full(run) == run


def test_words_stay_where_files_of_their_names_lie_and_files_are_found_in_every_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    words = ("self", "math", "code", "hf", "environment", "calculator", "student", "rules", "t")
    for name in (*words, "a", "b", "spans.py"):
        (tmp_path / name).write_text("")
    values: dict[str, Any] = {
        "student": "student",
        "teacher": "self",
        "reference": "soup:a, b",
        "models": {"t": {"kind": "mixture", "of": {"x": "self", "y": "soup:a,b"}}},
        "data": "environment",
        "reward": "math",
        "sampler": "hf",
        "environment": "calculator",
        "annotate": {
            "spans": {"by": "spans.py:f", "model": "a"},
            "skills": "rules",
            "debate": {"kind": "debate", "of": ["t", "b", "student"]},
        },
    }
    run = in_full(make_run(values))
    same = ("teacher", "data", "reward", "sampler", "environment")
    assert {name: getattr(run, name) for name in same} == {name: values[name] for name in same}
    assert run.student == f"{here}/student"
    assert run.reference == f"soup:{here}/a,{here}/b"
    assert run.models["t"]["of"] == {"x": "self", "y": f"soup:{here}/a,{here}/b"}
    assert run.annotate == {
        "spans": {"by": f"{here}/spans.py:f", "model": f"{here}/a"},
        "skills": "rules",
        "debate": {"kind": "debate", "of": ["t", f"{here}/b", "student"]},
    }
    assert in_full(run) == run


def test_two_runs_and_one_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call has a folder of its own; run.yaml runs again from anywhere; its origin is
    told.
    """
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "s")
    quick = {"steps": 1, "prompts_per_step": 1, "max_completion_length": 4, "device": "cpu"}
    one, two = (opdkit.distill("s", "s", ["2?"], **quick) for _ in range(2))
    assert [r.folder.name for r in (one, two)] == ["opd-001", "opd-002"]
    assert one.metrics[-1]["loss"] == pytest.approx(0, abs=1e-5)
    [line] = [json.loads(text) for text in (one.folder / ORIGIN).read_text().splitlines()]
    assert line["step"] == 0 and line["packages"]["torch"] and line["device"] == "cpu"
    assert {"command", "folder", "git", "python"} <= set(line)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2?"}\n')
    told = make_run({"student": "s", "teacher": "s", "data": "rows.jsonl", **quick_run()})
    done = opdkit.execute(told)
    monkeypatch.chdir(elsewhere)
    again = opdkit.execute(load_run(done.folder / "run.yaml", ["output=again"]))
    assert again.metrics[0]["loss"] == done.metrics[0]["loss"]


def quick_run() -> dict[str, object]:
    return {
        "steps": 1,
        "prompts_per_step": 1,
        "sampling": {"max_completion_length": 4},
        "device": "cpu",
    }
