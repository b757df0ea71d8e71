"""DAPO's rules outside the loss: which prompts teach something, and what length costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opdkit.base.errors import UserError
from opdkit.train.collect.filters import (
    DynamicSampling,
    MarkTokens,
    OverlongPenalty,
    informative,
)
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


def nothing() -> list[Rollout]:
    raise AssertionError("no further rollouts are needed")


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
    assert OverlongPenalty(20480, 4096).penalty(length) == penalty


def test_shaping_moves_the_reward_and_not_the_verdict():
    shaped = OverlongPenalty(10, 4)(
        [rollout("a", True, 8), rollout("a", True, 10), rollout("b", None, 10, None)], nothing
    )
    assert [(r.reward, r.correct) for r in shaped] == [(0.5, True), (0.0, True), (None, None)]


def test_a_margin_of_nothing_is_refused():
    with pytest.raises(ValueError, match="margin=0"):
        OverlongPenalty(10, 0)


def test_dynamic_sampling_draws_until_enough_prompts_are_informative():
    """Two are wanted: the first draw has one (b), the second that one again, the third two more, of
    which one is too many.
    """
    further = iter(
        [
            [rollout("b", True, 3), rollout("b", False, 4)],
            [rollout(p, right) for p in ("c", "d") for right in (True, False)],
        ]
    )
    first = [rollout(p, right) for p, right in zip("aabb", (True, True, True, False))]
    kept = DynamicSampling(2)(first, lambda: next(further))
    assert [(r.group, len(r.tokens)) for r in kept] == [("b", 1), ("b", 1), ("c", 1), ("c", 1)]
    assert next(further, None) is None
    assert DynamicSampling(1)(first, nothing) == first[2:]


def test_dynamic_sampling_keeps_a_group_whole_whatever_questions_it_answers():
    """One group of two questions, of which one is wanted: alone it would be all right."""
    both = [
        replace(rollout("both", right), question=question)
        for question, right in (("a", True), ("a", True), ("b", False), ("b", True))
    ]
    assert DynamicSampling(1)([*both, rollout("c", True), rollout("c", False)], nothing) == both
    apart = [
        replace(rollout(group, right), question="a")
        for group, right in (("a0", True), ("a0", False), ("a1", True), ("a1", True))
    ]
    assert DynamicSampling(1)(apart, nothing) == apart[:2]


def test_dynamic_sampling_gives_up_and_says_why():
    draws = []

    def more() -> list[Rollout]:
        draws.append(1)
        return [rollout("a", True)]

    with pytest.raises(UserError, match=r"found 0 prompts of 3 with .* in 48"):
        DynamicSampling(3)([], more)
    assert len(draws) == 15  # sixteen rounds with the first


def test_marks_are_added_to_those_that_are_there():
    written = replace(
        rollout("a", True, 3), tokens=[5, 6, 7], marks={"guided": [True, False, False]}
    )
    (marked,) = MarkTokens("newline", frozenset({5, 7}))([written], nothing)
    assert marked.marks == {"guided": [True, False, False], "newline": [True, False, True]}
