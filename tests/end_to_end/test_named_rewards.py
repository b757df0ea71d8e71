"""A run with several rewards by name: on the command line, in the metrics, the samples, the
evaluations and the report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opdkit import UserError, distill
from opdkit.base.files import read_lines
from opdkit.methods.method import Method
from opdkit.objective import Advantage, PolicyGradient, Reward
from opdkit.run.ask import ask
from opdkit.run.open import Given
from opdkit.run.settings import load_run
from tests.end_to_end.conftest import Shop
from tests.end_to_end.test_errors import refused


def test_from_the_command_line_to_the_report(shop: Shop, tmp_path: Path) -> None:
    """The rewards are 1 or 0; their sum counts the second ten times, and what is right is the
    first's to say.
    """
    run = tmp_path / "run"
    assert (
        shop.train(
            run,
            "--method=recap",
            "method.window=1",
            f"reward.even={shop.reward}",
            "reward.form=regex:(\\d+)",
            "reward_weights.form=10",
            f"evaluate.data={shop.data}",
            "num_generations=4",
            "sample_every=1",
            "steps=3",
        )
        == 0
    )
    assert load_run(run / "run.yaml").reward == {"even": shop.reward, "form": "regex:(\\d+)"}
    for number, line in enumerate(read_lines(run / "metrics.jsonl")):
        assert {"rewards/even", "rewards/form"} <= set(line)
        total = line["rewards/even"] + 10 * line["rewards/form"]
        assert line["reward/mean"] == pytest.approx(total)
        assert line["correct/mean"] == line["rewards/even"]
        weights = [line[name] for name in line if name.startswith("curriculum/weight_")]
        assert sum(weights) == pytest.approx(2 if number else 0)  # nothing is known at first
    for sample in read_lines(run / "samples" / "step_000002.jsonl"):
        assert set(sample["rewards"]) == {"even", "form"}
        assert sample["correct"] == (sample["rewards"]["even"] > 0)
    for result in read_lines(run / "evals.jsonl"):
        assert set(result["reward_means"]) == {"even", "form"}
    page = (run / "report.html").read_text()
    assert "Rewards by name" in page and "<span>even <b>" in page
    (state,) = (run / "checkpoint-3").glob("trainer_state.json")
    remembered = json.loads(state.read_text())["memory"]["reward_means"]
    assert {name: len(x) for name, x in remembered.items()} == {"even": 2, "form": 2}


def test_functions_by_name_in_python(shop: Shop, tmp_path: Path) -> None:
    values: dict[str, Any] = shop.values(tmp_path / "run", reward_weights={"long": 0.5})
    method = Method(PolicyGradient(Advantage(of=Reward("long"))) * 1.0 + PolicyGradient(Reward()))
    distill(
        values.pop("student"),
        values.pop("teacher"),
        values.pop("data"),
        method,
        reward={"long": lambda r: float(len(r.tokens)), "even": shop.reward},
        **values,
    )
    (first, _) = read_lines(tmp_path / "run" / "metrics.jsonl")
    total = 0.5 * first["rewards/long"] + first["rewards/even"]
    assert first["reward/mean"] == pytest.approx(total)


@pytest.mark.parametrize("reward", [None, {"other": "exact"}])
def test_a_method_that_reads_a_reward_which_is_not_there_is_refused(
    shop: Shop, tmp_path: Path, reward: Any
) -> None:
    method = Method(PolicyGradient(Reward("style")) + PolicyGradient(Reward()))
    if reward is None:
        reward = shop.reward
    with pytest.raises(UserError, match=r"reads the reward:style, and the run has .*set reward"):
        ask(shop.run(tmp_path, reward=reward), Given(method=method))


def test_weights_of_what_is_not_there_are_refused(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = shop.train(tmp_path / "run", "reward.a=exact", "reward_weights.b=2", "--method=grpo")
    refused(capsys, code, "reward_weights.b weighs no reward of the run")
