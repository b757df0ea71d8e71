"""Pass rates: what is remembered of a prompt."""

from __future__ import annotations

import json

from opdkit.curricula import PassRates
from opdkit.types import Rollout


def rollouts(prompt, results, **more):
    return [
        Rollout(f"{prompt}/{i}", [1], [2], [True], [0.0], [0.0], prompt, correct=r, **more)
        for i, r in enumerate(results)
    ]


def test_share_of_the_last_rollouts():
    curriculum, memory = PassRates(window=4), {"other": 1}
    memory = curriculum.observe(rollouts("a", [True, False]) + rollouts("b", [False]), memory)
    assert memory["pass_rate"] == {"a": 0.5, "b": 0.0} and memory["other"] == 1
    memory = curriculum.observe(rollouts("a", [True, True, True]), memory)
    # the last four of a: False, True, True, True
    assert memory["pass_rate"] == {"a": 0.75, "b": 0.0}
    # a visit counts whole
    assert curriculum.observe(rollouts("b", [True] * 6), memory)["pass_rate"]["b"] == 1.0


def test_survives_a_checkpoint_and_leaves_the_past_alone():
    curriculum = PassRates()
    before = curriculum.observe(rollouts("a", [True, False]), {})
    saved = json.loads(json.dumps(before))
    after = curriculum.observe(rollouts("a", [True, True]), before)
    assert curriculum.observe(rollouts("a", [True, True]), saved) == after
    assert saved == before and after["pass_rate"]["a"] == 0.75


def test_rewards_stand_in_for_correctness_and_none_teaches_nothing():
    memory = PassRates().observe(
        rollouts("a", [None, None], reward=0.5) + rollouts("b", [None]), {}
    )
    assert memory["pass_rate"] == {"a": 1.0}
