"""Whole runs in which the student acts in an environment: trained, evaluated, interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opdkit import UserError
from opdkit.cli import main
from opdkit.run.launch import execute
from opdkit.run.settings import make_run
from tests.end_to_end.conftest import Shop
from tests.end_to_end.crash import assert_same, in_child
from tests.environments import guess

WORLD = f"{Path(guess.__file__)}:Guess"
LIMITS = {"num_generations": 2, "max_completion_length": 160}


def settings(shop: Shop, output: Path, **more: Any) -> dict[str, Any]:
    given = shop.values(output, **more)
    del given["data"]  # the environment makes its own tasks
    world = {"kind": WORLD, "turn_tokens": 12, "max_turns": 3}
    return {"environment": world, **given, "sampling": LIMITS, **more}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_learns_from_episodes_and_is_evaluated_in_them(shop: Shop, tmp_path: Path) -> None:
    evaluate = {"data": "environment", "every": 1, "num_generations": 2, "teacher": True}
    done = execute(make_run(settings(shop, tmp_path / "run", evaluate=evaluate, sample_every=1)))
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 2 and all("reward/mean" in m for m in metrics)
    evals = lines(tmp_path / "run" / "evals.jsonl")
    assert {(e["name"], e["step"]) for e in evals} >= {("student", 0), ("teacher", 0)}
    # lengths are of what the student wrote
    own = [line["completions/mean_length"] * 4 for line in lines(tmp_path / "run/metrics.jsonl")]
    assert own == [line["tokens/trained"] for line in lines(tmp_path / "run/metrics.jsonl")]
    assert all(0 < e["mean_length"] <= 3 * 12 for e in evals)
    assert all(e["n_problems"] == 8 and e["samples_per_problem"] == 2 for e in evals)
    assert Path(done.model).is_dir()


@pytest.mark.parametrize(
    "method", ["grpo", {"name": "gkd", "arguments": {"lmbda": 1.0}}, "skill_sd", "trace"]
)
def test_methods_of_other_kinds_train_on_episodes(shop: Shop, tmp_path: Path, method: Any) -> None:
    execute(make_run(settings(shop, tmp_path / "run", method=method, steps=1)))
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_killed_run_goes_on_bit_for_bit(shop: Shop, tmp_path: Path) -> None:
    more = {"steps": 4, "checkpoint": {"every": 2}, "method": "grpo", "sample_every": 1}
    assert in_child(settings(shop, tmp_path / "whole", **more)) == 0
    broken = settings(shop, tmp_path / "broken", **more)
    assert in_child(broken, moment="after the optimiser", step=4) == -9
    assert in_child(broken, resume=True) == 0
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_what_cannot_be_in_a_run_with_an_environment(shop: Shop, tmp_path: Path) -> None:
    for more, said in (
        ({"reward": shop.reward}, "the environment's score"),
        ({"environment": "nowhere"}, "no kind of environment"),
        ({"data": {"source": shop.data, "template": "{prompt}!"}}, "data.template"),
        ({"environment": {"kind": WORLD, "max_turns": 0}}, "max_turns"),
        ({"environment": f"{WORLD}s"}, "defines no 'Guesss'"),
    ):
        with pytest.raises(UserError, match=said):
            execute(make_run(settings(shop, tmp_path / "run", **more)))
    without = settings(shop, tmp_path / "run", data="environment", environment=None)
    with pytest.raises(UserError, match="the run has no environment"):
        execute(make_run(without))


def test_commands_act_too(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--max-completion-length=60", "--samples=2"]
    assert main(["eval", shop.student, "--environment", WORLD, "--limit=2", *limits]) == 0
    assert "problems    2, 2 samples each" in capsys.readouterr().out
    world = f"{{kind: '{WORLD}', turn_tokens: 5}}"
    assert main(["sample", shop.student, "--environment", world, "--limit=1", *limits]) == 0
    assert capsys.readouterr().out.count(", reward ") == 2
