"""Replay of recent groups: how many, of which steps, whole, and how long."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from opdkit.curricula import MixPolicy, PassRates
from opdkit.curricula.together import join
from opdkit.types import Rollout


def wrote(step: int, prompts: int = 4, generations: int = 2) -> list[Rollout]:
    return [
        Rollout(
            f"{step}/q{p}/{g}",
            [p],
            [5, g],
            [True, True],
            [-1.0, -step - 0.5],
            [-1.0, -step - 0.5],
            f"q{p}",
            policy_version=step,
            reward=float(g),
            correct=bool(g),
        )
        for p in range(prompts)
        for g in range(generations)
    ]


def after(plan: MixPolicy, steps: int) -> dict:
    """Memory after so many steps, as a checkpoint gives it back."""
    memory: dict = {}
    for step in range(steps):
        memory = json.loads(json.dumps(plan.observe(wrote(step), memory)))
    return memory


@pytest.mark.parametrize(
    ("count", "share", "replayed"),
    [(5, 0.4, 2), (10, 0.4, 4), (4, 0.4, 2), (3, 0.9, 2), (1, 0.9, 0)],
)
def test_a_share_of_the_groups_and_at_least_one_new(count, share, replayed):
    plan = MixPolicy(share=share, window=4)
    found = plan.recalled(count, 9, 0, after(plan, 9)).instead
    assert len({r.group for r in found}) == replayed


def test_groups_are_whole_as_they_were_and_under_names_of_their_own():
    plan = MixPolicy()
    found = plan.recalled(5, 3, 0, after(plan, 3))
    assert found.beside == ()
    written = {r.id: r for step in (1, 2) for r in wrote(step)}
    for r in found.instead:
        assert replace(r, group=written[r.id].group) == written[r.id]
    groups = Counter(r.group for r in found.instead)
    assert set(groups.values()) == {2} and not set(groups) & {f"q{p}" for p in range(4)}
    # of the same prompt from two steps there are two groups
    every = {r.group for s in range(40) for r in plan.recalled(9, 3, s, after(plan, 3)).instead}
    assert len(every) == 8


def test_each_of_the_last_steps_is_as_probable_and_none_before():
    plan = MixPolicy(window=3)
    memory = after(plan, 7)
    seen = Counter(
        r.id.split("/")[0] for seed in range(400) for r in plan.recalled(5, 7, seed, memory).instead
    )
    assert set(seen) == {"4", "5", "6"}
    assert all(n / seen.total() == pytest.approx(1 / 3, abs=0.05) for n in seen.values())
    assert plan.recalled(5, 7, 3, memory) == plan.recalled(5, 7, 3, memory)
    assert plan.recalled(5, 7, 3, memory) != plan.recalled(5, 8, 3, memory)


def test_while_there_is_too_little_more_is_written():
    plan = MixPolicy(share=0.9)
    assert plan.recalled(20, 0, 0, {}).instead == ()
    assert len({r.group for r in plan.recalled(20, 1, 0, after(plan, 1)).instead}) == 4


def test_the_memory_is_bounded_and_empty_once_it_is_on_policy():
    plan = MixPolicy(window=2, until=5)
    sizes = [sum(map(len, after(plan, n)["recent"]["groups"])) for n in range(1, 8)]
    assert sizes == [4, 8, 8, 8, 0, 0, 0]  # the fifth step was the last to replay
    assert plan.recalled(5, 5, 0, after(plan, 4)).instead == ()
    assert plan.recalled(5, 4, 0, after(plan, 4)).instead != ()
    assert MixPolicy(share=0).observe(wrote(0), {}) == {}


def test_passes_by_step():
    plan = MixPolicy(utd=3, until=2)
    assert [plan.passes(step, 9) for step in range(4)] == [3, 3, None, None]
    both = join(plan, PassRates(), ("a", "b"))
    assert [both.passes(step, 9) for step in range(4)] == [3, 3, None, None]
    assert both.observe(wrote(0), {})["pass_rate"] == {f"q{p}": 0.5 for p in range(4)}
