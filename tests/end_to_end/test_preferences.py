"""Runs on preferences: ten steps from the command line, with all weights and with adapters; killed
in the middle they go on as if they had not been; what cannot work is refused with its reason.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.base.clock import Clock
from opdkit.base.files import read_lines
from opdkit.cli import main
from opdkit.run import build
from opdkit.run.build import prepare
from opdkit.train.collect.collect import collect
from opdkit.train.loop import train_step
from tests.common.tiny import save_tiny
from tests.end_to_end.conftest import Shop, gsm8k_rows, train, write_rows
from tests.end_to_end.crash import assert_same, in_child
from tests.end_to_end.test_training import check_trained

JUDGE = '''
def shorter(row, a, b):
    """The shorter answer is the better one."""
    return 0.5 if len(a) == len(b) else float(len(a) < len(b))
'''


@pytest.fixture(scope="module")
def prefs(shop: Shop) -> str:
    """GSM8K's questions, each with a right and a wrong answer."""
    rows = [
        {"prompt": row["question"], "chosen": f" {row['answer'][-1]}", "rejected": f" {i} or so"}
        for i, row in enumerate(gsm8k_rows(6))
    ]
    (shop.folder / "judge.py").write_text(JUDGE)
    return write_rows(shop.folder / "prefs.jsonl", rows)


def flags(shop: Shop, method: str) -> list[str]:
    """What a run of a method names besides its student and data."""
    own = f"--reward={shop.folder / 'judge.py'}:shorter"
    soup = f"reference=soup:{shop.student},{shop.teacher}"
    return {
        "f_dpo": [f"--reference={shop.student}"],
        "f_dpo(pairs='rollouts')": [f"--reward={shop.reward}"],
        "salsa": [soup, f"--reward={shop.reward}"],
        "nash_mp": [own],
        "nash_mp(kappa=0.0, every=2, baseline='leave_one_out')": [f"--reward={shop.reward}"],
    }.get(method, [])


METHODS = (
    "f_dpo",
    "f_dpo(kind='forward_kl')",
    "f_dpo(kind='js')",
    "f_dpo(kind='alpha')",
    "f_dpo(pairs='rollouts')",
    "hypo",
    "salsa",
    "nash_mp",
    "nash_mp(kappa=0.0, every=2, baseline='leave_one_out')",
)


@pytest.mark.parametrize("lora", [(), ("lora.r=4",)], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps(
    shop: Shop, tmp_path: Path, prefs: str, method: str, lora: tuple[str, ...]
) -> None:
    words = [f"--student={shop.student}", f"--data={prefs}", f"--output={tmp_path / 'run'}"]
    # slowly: the slope under forward KL is exponential, and soon nothing would be left to learn
    more = ["steps=10", "num_generations=6", "learning_rate=1e-4", *lora]
    assert train(*words, f"--method={method}", *flags(shop, method), *more) == 0
    check_trained(tmp_path / "run", shop.student, 10)


def values(shop: Shop, output: Path, method: str, data: str, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "salsa": {"reference": f"soup:{shop.student},{shop.teacher}", "reward": shop.reward},
        "nash_mp": {"reward": shop.reward},
    }.get(method, {})
    return shop.values(output, method=method, data=data, teacher=None, **found, **settings)


@pytest.mark.parametrize("method", ["hypo", "salsa", "nash_mp"])
def test_killed_and_resumed_it_is_the_run_that_was_never_killed(
    shop: Shop, tmp_path: Path, prefs: str, method: str
) -> None:
    """With the value head, and with the anchor, which plays at the step after the resume."""
    settings = {"steps": 4, "optim": {"passes": 2}, "checkpoint": {"every": 1, "keep": 9}}
    run = values(shop, tmp_path / "killed", method, prefs, **settings)
    assert in_child(run, moment="before the optimiser", step=3) == -9
    assert in_child(run, resume=True) == 0
    assert in_child({**run, "output": str(tmp_path / "whole")}) == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")


def test_what_is_preferred_becomes_likelier(shop: Shop, tmp_path: Path, prefs: str) -> None:
    """Against the student as it began, which nobody names; nothing is sampled."""
    assert (
        train(
            f"--student={shop.student}",
            f"--data={prefs}",
            "--method=f_dpo",
            f"--output={tmp_path / 'run'}",
            "steps=20",
            "prompts_per_step=6",
            "learning_rate=5e-3",
        )
        == 0
    )
    lines = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert lines[0]["pairs/margin"] == 0 and lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[-1]["pairs/margin"] > 0.5 and lines[-1]["pairs/accuracy"] == 1
    assert lines[-1]["loss"] < 0.5 and lines[-1]["tokens/sampled_so_far"] == 0


def test_curves_of_pairs_are_of_all_pairs_of_the_step(
    shop: Shop, tmp_path: Path, prefs: str
) -> None:
    """Learnt in one optimiser step or in two, of which each has a pair; hardly anything moves."""
    settings = {"steps": 1, "prompts_per_step": 2, "optim": {"learning_rate": 1e-12}}
    told = []
    for number in (1, 2):
        run = values(shop, tmp_path / str(number), "f_dpo", prefs, **settings)
        run["reference"] = shop.teacher
        run["optim"]["minibatches"] = number
        job, state = prepare(build_run(run))
        with job.recorder.trackers:
            train_step(job, state)
        [line] = read_lines(tmp_path / str(number) / "metrics.jsonl")
        told.append([line[f"pairs/{name}"] for name in ("chosen", "rejected", "margin")])
    assert told[0] == pytest.approx(told[1], rel=1e-4) and all(told[0])


def test_the_students_own_responses_stand_beside_the_pairs(
    shop: Shop, tmp_path: Path, prefs: str
) -> None:
    """A step of hypo: two of each row, and two of the student's own, of which the KL is known."""
    job, state = prepare(shop.run(tmp_path / "run", method="hypo", data=prefs, teacher=None))
    made = collect(job.collector, 0, Clock(), step=0, total_steps=2, memory={}).rollouts
    assert [r.correct for r in made] == [True, False] * 2 + [None] * 4
    assert sum("online" in r.marks for r in made) == 4
    with job.recorder.trackers:
        train_step(job, state)
    [line] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["loss/pairs"] > 0 and abs(line["kl/reference"]) < 1e-5


def test_the_anchor_plays_then_the_student(shop: Shop, tmp_path: Path, prefs: str) -> None:
    """By whom, and that the anchor's words are those of its own weights: where it is another than
    the student it says something else to the same draw.
    """
    run = values(shop, tmp_path / "run", "nash_mp", prefs)
    job, state = prepare(build_run(run))

    first = job.collector.stream.state()

    def opponents(step: int) -> list[dict[str, Any]]:
        job.collector.stream.load(first)  # the same prompts again
        made = collect(
            job.collector, job.student.updates, Clock(job.student.device), step=step, total_steps=9,
            memory={},
        )  # fmt: skip
        assert all(r.reward in (0.0, 0.5, 1.0) for r in made.rollouts)
        for r in made.rollouts:
            assert r.correct is (r.reward == 1.0)
        return [r.row["opponent"] for r in made.rollouts]

    assert {o["by"] for o in opponents(0)} == {"anchor"}
    assert {o["by"] for o in opponents(1)} == {"student"}
    before = [o["tokens"] for o in opponents(2)]
    with torch.no_grad():
        for weight in job.student.parameters:
            weight.add_(torch.randn_like(weight))
    assert [o["tokens"] for o in opponents(2)] == before  # the anchor has not moved
    with job.recorder.trackers:
        train_step(job, state)
    assert [o["tokens"] for o in opponents(2)] != before


def build_run(settings: dict[str, Any]) -> Any:
    from opdkit.run.settings import make_run

    return make_run(settings)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Why?"}, "row '1' has no pair: its column 'chosen' is not there"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "a"}, "'1' are the same text"),
        (
            {"prompt": "Why?", "chosen": [{"role": "user", "content": "How?"},
             {"role": "assistant", "content": "a"}], "rejected": "b"},
            "the prompts of row '1' differ",
        ),
    ],
)  # fmt: skip
def test_rows_that_are_no_pairs(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], said: str
) -> None:
    """Before anything is loaded; with the student's own pairs they are prompts like others."""
    monkeypatch.setattr(build, "open_models", None)
    good = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
    data = write_rows(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(UserError, match=said):
        prepare(shop.run(tmp_path / "run", method="f_dpo", data=data))
    with pytest.raises(TypeError):  # as far as the models
        own = {"name": "f_dpo", "arguments": {"pairs": "rollouts"}}
        prepare(shop.run(tmp_path / "run", method=own, data=data, reward=shop.reward))


def test_pairs_of_rollouts_need_a_reward_and_pairs_of_data_none(
    shop: Shop, tmp_path: Path, prefs: str
) -> None:
    own = {"name": "f_dpo", "arguments": {"pairs": "rollouts"}}
    with pytest.raises(UserError, match=r"'f_dpo' reads whether a response is right.*no reward"):
        prepare(shop.run(tmp_path / "a", method=own, data=prefs))
    with pytest.raises(UserError, match="num_generations=1 each is alone"):
        alone = {"num_generations": 1}
        prepare(
            shop.run(tmp_path / "a", method=own, data=prefs, reward=shop.reward, sampling=alone)
        )
    cold = {"num_generations": 1, "temperature": 0.0}
    prepare(shop.run(tmp_path / "b", method="f_dpo", data=prefs, sampling=cold))


def test_a_soup_is_named_and_of_one_shape(
    shop: Shop, tmp_path: Path, prefs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", f"--student={shop.student}", f"--data={prefs}", "--method=salsa"]
    base += [f"--reward={shop.reward}", f"--output={tmp_path / 'run'}", "device=cpu", "steps=1"]
    wide = save_tiny(tmp_path / "wide", "qwen3", hidden=64)
    for more, said in (
        ([], "method 'salsa' has a reference of the kind soup, and the run names none"),
        ([f"--reference={shop.teacher}"], "the run names one of the kind local"),
        ([f"--reference=soup:{shop.student}"], "at least two checkpoints"),
        ([f"--reference=soup:{shop.student},{wide}"], "is no checkpoint of the same shape"),
    ):
        assert main([*base, *more]) == 2
        assert said in capsys.readouterr().err
    said_so = [f"--reference=soup:{shop.student},{shop.teacher}", "method.alpha=0.25"]
    assert main([*base, *said_so, "--dry-run", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert run["reference"]["others"] == 0.25 and run["reference"]["kind"] == "soup"


def test_judges_and_opponents_that_do_not_fit(shop: Shop, tmp_path: Path, prefs: str) -> None:
    judge = f"{shop.folder / 'judge.py'}:shorter"
    for settings, said in (
        ({"method": "grpo", "reward": judge}, "'grpo' has no opponent to compare with"),
        ({"method": "nash_mp", "reward": judge, "evaluate": {"data": prefs}}, "answered once"),
        (
            {"method": "grpo", "reward": shop.reward, "curriculum": "opponent"},
            "brings no copy of the student by that name",
        ),
        ({"method": "nash_mp"}, "no reward"),
        ({"method": "f_dpo", "curriculum": "opponent"}, "cannot be combined"),
        ({"method": "grpo", "curriculum": "preference"}, "a policy gradient"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(shop.run(tmp_path / "run", data=prefs, **settings))


PAGE = Path(__file__).parents[2] / "docs" / "preferences.md"
COMMANDS = re.findall(r"^    (opdkit train .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_trains(
    shop: Shop, tmp_path: Path, prefs: str, command: str
) -> None:
    said = {
        "MODEL": shop.student,
        "OTHER": shop.teacher,
        "A": shop.student,
        "soup:A,B": f"soup:{shop.student},{shop.teacher}",
        "prefs.jsonl": prefs,
        "prompts.jsonl": prefs,
        "judge.py:better": f"{shop.folder / 'judge.py'}:shorter",
        "judge:URL": shop.reward,
        "math": shop.reward,
    }
    _, _, *words = (said.get(word, word) for word in shlex.split(command, comments=True))
    quick = ["steps=1", "prompts_per_step=2", "max_completion_length=6", "device=cpu"]
    assert main(["train", *words, f"--output={tmp_path / 'run'}", *quick]) == 0


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 6
