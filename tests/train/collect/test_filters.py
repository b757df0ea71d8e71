"""DAPO's rules outside the loss: which prompts teach something, and what length costs."""

from __future__ import annotations

import pytest

from opdkit.train.collect.filters import informative, overlong_penalty, shape_overlong
from opdkit.types import Rollout


def rollout(
    group: str, correct: bool | None, length: int = 1, reward: float | None = 1.0
) -> Rollout:
    return Rollout(
        f"{group}{length}",
        [],
        [0] * length,
        [True] * length,
        [],
        [],
        group,
        correct=correct,
        reward=reward,
    )


def test_prompts_that_are_all_right_or_all_wrong_are_dropped():
    groups = [
        ("a", True),
        ("b", False),
        ("c", True),
        ("a", True),
        ("b", False),
        ("c", False),
        ("d", True),
        ("e", None),
    ]
    assert [r.group for r in informative([rollout(*pair) for pair in groups])] == ["c", "c"]


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(16000, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (20481, -1.0)],
)
def test_overlong_penalty(length, penalty):
    assert overlong_penalty(length, 20480, 4096) == penalty


def test_shaping_moves_the_reward_and_not_the_verdict():
    shaped = shape_overlong(
        [rollout("a", True, 8), rollout("a", True, 10), rollout("b", None, 10, None)], 10, 4
    )
    assert [(r.reward, r.correct) for r in shaped] == [(0.5, True), (0.0, True), (None, None)]


def test_a_margin_of_nothing_is_refused():
    with pytest.raises(ValueError, match="margin=0"):
        overlong_penalty(1, 10, 0)
