"""Interrupted and resumed is the same run as one never interrupted, bit for bit (PITFALLS R1)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import opdkit
from opdkit import UserError, distill
from opdkit.base.files import read_lines
from opdkit.train import checkpoint as checkpoints
from opdkit.train import loop
from tests.end_to_end.conftest import Shop
from tests.end_to_end.crash import MOMENTS, assert_same, in_child

EXAMPLES = Path(opdkit.__file__).parent.parent / "examples"
KILLED = -9
STEPS = 6
RUNS: dict[str, dict[str, Any]] = {
    "opd": {"method": "opd"},
    "several optimiser steps": {
        "method": {"name": "drift_gating"},
        "optim": {"passes": 2, "minibatches": 2, "schedule": "cosine"},
    },
    "curriculum with memory": {"method": "paced", "sampling": {"num_generations": 4}},
    "replay": {"method": {"name": "distillm", "threshold": 0.7}},
    "rehearsal of what it could do": {
        "method": "dph_rl(samples=4, enough=2, rehearsed=2, eta=0.5)",
        "optim": {"passes": 2, "minibatches": 2},
    },
    "replayed groups and an anchor that is moved": {
        "method": {"name": "remix", "p": 0.5, "reincarnate": 3, "beta": 0.3},
        "prompts_per_step": 3,
        "optim": {"schedule": "linear"},
    },
    "the same with adapters": {
        "method": {"name": "remix", "p": 0.5, "reincarnate": 2, "beta": 0.3},
        "lora": {"r": 4},
    },
    "prompts of the frontier": {
        "method": "opd",
        "curriculum": {"kind": "frontier", "smoothing": 0.5, "sigma": 0.1},
    },
    "a ladder of lengths": {
        "method": "gkd",
        "curriculum": {"kind": "entropy_length", "ladder": [2, 4, 8], "min_entropy": 0.0},
    },
    "guided rollouts": {"method": "tropd"},
    "pairs of one's own": {
        "method": {"name": f"{EXAMPLES / 'own_pair_loss.py'}:pairs"},
        "sampling": {"num_generations": 4},
        "optim": {"passes": 2, "minibatches": 2},
    },
    "groups of one's own": {
        "method": {"name": f"{EXAMPLES / 'own_group_loss.py'}:listwise"},
        "sampling": {"num_generations": 4},
    },
    "a value head of one's own": {
        "method": f"{EXAMPLES / 'own_value_head.py'}:valued",
        "optim": {"passes": 2, "minibatches": 2},
    },
    "a moving average of one's own": {"method": f"{EXAMPLES / 'own_ema.py'}:steady"},
    "noise on its layers": {
        "method": {"name": "alp", "sigma": 0.1},
        "sampling": {"num_generations": 4},
        "optim": {"passes": 2, "minibatches": 2},
        "lora": {"r": 4},
    },
    "rewards that are weighed by how they went": {
        "method": {"name": "recap", "window": 2, "temperature": 0.1},
        "sampling": {"num_generations": 4},
        "reward": {"form": "regex:(a)", "half": "OWN"},
    },
    "a controller and its critic": {
        "method": {"name": "safe", "tau0": 0.01, "critic_learning_rate": 1e-3},
        "sampling": {"num_generations": 4},
        "optim": {"passes": 2, "minibatches": 2},
    },
    "skills of its own trajectories": {
        "method": "skill_sd",
        "annotate": {"skills": {"by": "rules", "keep": 2}},
        "sampling": {"num_generations": 2, "stop": ["e", "a"]},
        "evaluate": None,
    },
    "a transport over the step": {
        "method": {"name": "sinkd", "items": 5},
        "optim": {"passes": 2, "minibatches": 2},
    },
    "tokens chosen from the step": {"method": "eksft", "optim": {"passes": 2}},
    "teachers that debate": {
        "method": "opd",
        "annotate": {"debate": {"of": ["teacher", "student"], "max_tokens": 4}},
    },
    "a baseline over what was learnt from": {
        "method": {"name": "f_dpg", "window": 5},
        "optim": {"passes": 2, "minibatches": 2},
    },
    "how undecided it was as it began": {
        "method": {"name": "gtpo", "threshold": 1.5},
        "sampling": {"num_generations": 4},
        "optim": {"passes": 2, "minibatches": 2},
    },
    "steps near the student before them": {"method": "mdpo", "optim": {"passes": 2}},
    "draws among tokens of high covariance": {
        "method": {"name": "clip_cov", "lb": 0.1, "ratio": 0.2},
        "optim": {"passes": 2},
    },
    "adapters with dropout": {"method": "opd", "lora": {"r": 4, "dropout": 0.3}},
}


def values(shop: Shop, output: Path, **settings: Any) -> dict[str, Any]:
    """A run that evaluates every second step, saves every third, and needs several micro-batches
    for a step.
    """
    return shop.values(
        output,
        **{
            "steps": STEPS,
            "reward": shop.reward,
            "evaluate": {"data": shop.data, "every": 2, "teacher": True},
            "checkpoint": {"every": 3},
            "micro_batch_tokens": 64,
            "sample_every": 2,
            **settings,
        },
    )


@pytest.fixture(scope="module")
def unbroken(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain run, never interrupted."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert in_child(values(shop, folder)) == 0
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_killed_twice_at_random_moments_and_resumed_is_the_run_that_was_never_killed(
    shop: Shop, tmp_path: Path, name: str
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"random moments from seed {seed}")
    rng = random.Random(seed)
    first, second = sorted(rng.randint(1, STEPS) for _ in range(2))
    settings = dict(RUNS[name])
    if isinstance(named := settings.get("reward"), dict):
        settings["reward"] = {k: v.replace("OWN", shop.reward) for k, v in named.items()}
    assert in_child(values(shop, tmp_path / "whole", **settings)) == 0
    for resume, step in ((False, first), (True, second)):
        moment = rng.choice(MOMENTS)
        print(f"killed at step {step}, {moment}")
        assert (
            in_child(
                values(shop, tmp_path / "broken", **settings),
                resume=resume,
                moment=moment,
                step=step,
            )
            == KILLED
        )
    assert in_child(values(shop, tmp_path / "broken", **settings), resume=True) == 0
    assert_same(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize("moment", MOMENTS)
def test_every_moment_of_a_step_can_be_the_last(
    shop: Shop, tmp_path: Path, unbroken: Path, moment: str
) -> None:
    assert in_child(values(shop, tmp_path / "run"), moment=moment, step=5) == KILLED
    assert in_child(values(shop, tmp_path / "run"), resume=True) == 0
    assert_same(tmp_path / "run", unbroken)


def test_killed_while_a_checkpoint_is_written_falls_back_to_the_one_before(
    shop: Shop, tmp_path: Path, unbroken: Path
) -> None:
    run = values(shop, tmp_path / "run")
    assert in_child(run, moment="writing a checkpoint", step=6) == KILLED
    assert (tmp_path / "run" / ".partial-checkpoint-6").is_dir()
    newest = checkpoints.newest(tmp_path / "run")
    assert newest is not None and newest.name != "checkpoint-6"
    assert not (tmp_path / "run" / ".partial-checkpoint-6").exists()
    assert in_child(run, resume=True) == 0
    assert_same(tmp_path / "run", unbroken)


def test_killed_before_the_first_checkpoint_starts_again_and_repeats_no_line(
    shop: Shop, tmp_path: Path, unbroken: Path
) -> None:
    assert in_child(values(shop, tmp_path / "run"), moment="after recording", step=1) == KILLED
    assert checkpoints.newest(tmp_path / "run") is None
    assert in_child(values(shop, tmp_path / "run"), resume=True) == 0
    assert_same(tmp_path / "run", unbroken)


def test_a_finished_run_resumed_changes_nothing(shop: Shop, tmp_path: Path, unbroken: Path) -> None:
    assert in_child(values(shop, tmp_path / "run")) == 0
    assert in_child(values(shop, tmp_path / "run"), resume=True) == 0
    assert_same(tmp_path / "run", unbroken)


def train(shop: Shop, output: Path, reward: Any, **settings: Any) -> None:
    """The run in this process, with a reward of one's own."""
    given = values(shop, output, **settings)
    del given["reward"]
    distill(
        given.pop("student"),
        given.pop("teacher"),
        given.pop("data"),
        given.pop("method", "opd"),
        reward=reward,
        **given,
    )


def even(rollout: Any) -> float:
    return float(sum(rollout.tokens) % 2 == 0)


def failing(start: str, error: BaseException) -> Any:
    """The reward, until a rollout's id starts so."""

    def reward(rollout: Any) -> float:
        if rollout.id.startswith(start):
            raise error
        return even(rollout)

    return reward


@pytest.fixture(scope="module")
def whole(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(shop, folder, even)
    return folder


@pytest.mark.parametrize(
    "error", [UserError("the judge is away"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
def test_an_error_in_a_step_saves_the_step_before_it(
    shop: Shop, tmp_path: Path, whole: Path, error: BaseException
) -> None:
    """Rollouts of the sixth step are called 5/...; checkpoints are due every three steps."""
    with pytest.raises(type(error)):
        train(shop, tmp_path / "run", failing("5/", error))
    newest = checkpoints.newest(tmp_path / "run")
    assert newest is not None and newest.name == "checkpoint-5"
    assert json.loads((newest / "trainer_state.json").read_text())["step"] == 5
    train(shop, tmp_path / "run", even, resume=True)
    assert_same(tmp_path / "run", whole)


def test_what_was_found_out_before_the_first_step_is_not_found_out_again(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool of a run that failed in its first step is there, saved as a checkpoint of no step;
    rollouts that made it have no step in their names.
    """
    settings = RUNS["rehearsal of what it could do"]
    train(shop, tmp_path / "whole", even, **settings)
    asked: list[str] = []

    def reward(rollout: Any) -> float:
        asked.append(rollout.id)
        return even(rollout)

    def away(*job_and_state: Any) -> None:
        raise UserError("the first step fails")

    with monkeypatch.context() as first, pytest.raises(UserError, match="the first step fails"):
        first.setattr(loop, "train_step", away)
        train(shop, tmp_path / "run", reward, **settings)
    newest = checkpoints.newest(tmp_path / "run")
    assert newest is not None and newest.name == "checkpoint-0"
    assert len([name for name in asked if name.count("/") == 1]) >= 6 * 4
    asked.clear()
    train(shop, tmp_path / "run", reward, resume=True, **settings)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert asked and all(name.count("/") == 2 for name in asked)
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    rehearsed = state["memory"]["rehearsal"]
    assert rehearsed["pool"] and len(rehearsed["pool"]) + len(rehearsed["explore"]) == 6


def test_an_error_in_an_evaluation_saves_its_step_and_evaluates_again(
    shop: Shop, tmp_path: Path, whole: Path
) -> None:
    asked = 0

    def reward(rollout: Any) -> float:
        nonlocal asked
        asked += 1
        if len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 4 and rollout.id.startswith("4/"):
            raise UserError("the judge is away")
        return even(rollout)

    with pytest.raises(UserError, match="the judge is away"):
        train(shop, tmp_path / "run", reward)
    assert [(e["name"], e["step"]) for e in read_lines(tmp_path / "run" / "evals.jsonl")] == [
        ("teacher", 0),
        ("student", 0),
        ("student", 2),
    ]
    newest = checkpoints.newest(tmp_path / "run")
    assert newest is not None and newest.name == "checkpoint-4"
    train(shop, tmp_path / "run", even, resume=True)
    assert_same(tmp_path / "run", whole)
