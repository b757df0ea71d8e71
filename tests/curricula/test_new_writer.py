"""A writer in one's own file: that of docs/writing_methods.md trains, and no module knows it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.base.files import read_lines
from opdkit.cli import main
from opdkit.curricula import PassRates, reads_cache, together
from opdkit.methods.method import load
from opdkit.types import Prompt, Sampling
from tests.common.tiny import save_tiny
from tests.curricula.context import context

DOCS = Path(__file__).parents[2] / "docs" / "writing_methods.md"


@pytest.fixture
def method(tmp_path: Path) -> str:
    section = DOCS.read_text(encoding="utf-8").partition("## A curriculum of your own")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S)
    assert code is not None
    (tmp_path / "own.py").write_text(code[1], encoding="utf-8")
    return f"{tmp_path / 'own.py'}:halfway"


def test_two_steps_train_on_what_it_writes(method: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + {i} ="}) + "\n" for i in range(4)))
    flags = {
        "student": save_tiny(tmp_path / "student", "qwen3", seed=1),
        "teacher": save_tiny(tmp_path / "teacher", "qwen3", seed=2),
        "data": data,
        "method": method,
        "output": tmp_path / "run",
    }
    quick = ("steps=2", "prompts_per_step=2", "max_completion_length=8", "device=cpu")
    sampled = ("sample_every=1", "learning_rate=1e-3", "num_generations=5", "method.tries=2")
    assert main(["train", *(f"--{k}={v}" for k, v in flags.items()), *quick, *sampled]) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    written = [read_lines(tmp_path / "run" / "samples" / f"step_00000{n}.jsonl") for n in (1, 2)]
    for step in written:  # two prompts, one response and two that begin with its half
        assert [r["id"].rpartition("/")[2] for r in step] == ["0", "0", "0", "1", "0", "1"]
        for first, branches in ((step[0], step[2:4]), (step[1], step[4:])):
            half = first["pieces"][: len(first["pieces"]) // 2]
            assert all(r["pieces"][: len(half)] == half for r in branches)
    # tokens that the student continued from are not its own writing of this time
    tokens = sum(len(r["pieces"]) for step in written for r in step)
    halves = sum(2 * (len(r["pieces"]) // 2) for step in written for r in step[:2])
    assert lines[-1]["tokens/sampled_so_far"] == tokens - halves


def test_it_combines_as_what_it_says_of_itself(method: str) -> None:
    own = load(method)
    writer = own.curriculum.writer
    assert writer is not None and writer.own and not reads_cache(own.curriculum)
    both = (own * load("paced")).curriculum
    assert both == together.Together((own.curriculum, PassRates())) and both.writer == writer
    assert (load("gkd") + own).curriculum == own.curriculum
    with pytest.raises(UserError, match="each brings its own curriculum, Halfway"):
        own + load("tropd")
    with pytest.raises(UserError, match="decides who writes"):
        load("opd") * (own * load("iw_opd"))


def test_it_can_be_asked_without_a_run(method: str) -> None:
    writer = load(method, tries=1).curriculum.writer
    assert writer is not None
    written = writer.write(context([Prompt("q", [1])], sampling=Sampling(num_generations=9)))
    assert [(r.group, r.tokens) for r in written] == [("q", [0]), ("q:again", [0])]
