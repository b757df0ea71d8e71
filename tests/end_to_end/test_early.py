"""A run whose teachers' servers score rollouts as each ends is the run whose servers are asked in
the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opdkit.base.files import read_lines
from opdkit.models.load import load_model, load_tokenizer
from opdkit.run.launch import execute
from opdkit.run.settings import make_run
from opdkit.train.record import TIMINGS
from tests.common.fake_server import FakeServer
from tests.end_to_end.conftest import Shop
from tests.end_to_end.test_ranks import compare, data, values
from tests.environments import guess

__all__ = ["data"]


WORLD = {"kind": f"{Path(guess.__file__)}:Guess", "turn_tokens": 12, "max_turns": 3}


def lines(folder: Path, early: bool = False) -> list[dict[str, float]]:
    return [
        {k: v for k, v in line.items() if k.startswith("early/") == early}
        for line in (
            {k: v for k, v in line.items() if early or not k.startswith(TIMINGS)}
            for line in read_lines(folder / "metrics.jsonl")
        )
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "opd"},
        {"method": "opd", "dynamic_sampling": True},
        {"method": "opd", "ahead": 1},
        {"method": "tropd"},
        {"method": "opd", "environment": WORLD},
    ],
    ids=["opd", "dropped", "ahead", "top k", "episodes"],
)
def test_the_same_run(settings: dict[str, Any], shop: Shop, tmp_path: Path) -> None:
    model, tokenizer = load_model(shop.teacher), load_tokenizer(shop.teacher)
    with FakeServer(model, tokenizer, max_logprobs=100, at_ids=True) as server:
        for early in (False, True):
            teacher = {"kind": "server", "urls": [server.url], "early": early}
            given = {"reward": shop.reward, "steps": 3, **settings}
            values = shop.values(tmp_path / str(early), **given)
            if "environment" in given:  # it has questions of its own, and says what they are worth
                del values["data"], values["reward"]
            execute(make_run({**values, "teacher": teacher}))
    assert lines(tmp_path / "True") == lines(tmp_path / "False")
    told = lines(tmp_path / "True", early=True)
    assert all(line["early/used"] >= 4 for line in told)  # 2 prompts of 2 rollouts
    assert all(line["early/failed"] == 0 for line in told)
    assert not any(lines(tmp_path / "False", early=True))
    timeline = read_lines(tmp_path / "True" / "timeline.jsonl")
    assert all(["teacher", "score"] in [s[:2] for s in line["spans"]] for line in timeline)
    if settings.get("dynamic_sampling"):
        begun = sum(line["early/begun"] for line in told)
        dropped = begun - sum(line["early/used"] for line in told)
        assert dropped > 0


@pytest.mark.ranks
def test_on_two_and_three_processes(shop: Shop, data: str, tmp_path: Path) -> None:
    """Written by the processes, or elsewhere at the word of the first, a step ahead or not; each
    reads the answers about what it learns from, whoever began them.
    """
    model, tokenizer = load_model(shop.teacher, dtype="float64"), load_tokenizer(shop.teacher)
    with FakeServer(model, tokenizer, max_logprobs=100, at_ids=True) as server:
        teacher = {"kind": "server", "urls": [server.url], "early": True}
        cases = {
            f"{method}, {kind}, ahead {ahead}": values(
                shop, data, tmp_path, method, ahead=ahead, sampler={"kind": kind}, teacher=teacher
            )
            for method in ("opd", "tropd")
            for kind, ahead in (("hf", 0), ("copy", 0), ("copy", 1))
        }
        told = compare(cases, tmp_path, (2, 3))
    for name in cases:
        one, *several = (
            [{k: v for k, v in line.items() if k.startswith("early/")} for line in of["metrics"]]
            for of in (found[name] for found in told)
        )
        assert all(of == one for of in several), name
        begun, used = (sum(line[f"early/{what}"] for line in one) for what in ("begun", "used"))
        assert begun == used >= 12, name
