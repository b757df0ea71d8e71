"""Which rollouts each optimiser step takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from opdkit.train.loop import _optimiser_steps
from opdkit.train.settings import Optim
from opdkit.types import Rollout


def job(minibatches: int) -> Any:
    return SimpleNamespace(
        seed=0,
        student=SimpleNamespace(device="cpu", optim=Optim(minibatches=minibatches)),
    )


def rollouts(prompts: int, generations: int) -> list[Rollout]:
    return [
        Rollout(f"0/{p}/{g}", [1], [2], [True], [-1.0], [-1.0], str(p))
        for p in range(prompts)
        for g in range(generations)
    ]


@pytest.mark.parametrize("minibatches", [2, 3, 5, 9])
def test_every_pass_takes_every_rollout_once_and_keeps_a_prompts_together(minibatches: int) -> None:
    rows = rollouts(5, 4)
    steps = [part.tolist() for part in _optimiser_steps(job(minibatches), rows, 3, 2)]  # type: ignore[union-attr]
    count = min(minibatches, 5)
    assert len(steps) == 2 * count
    for number in range(2):
        mine = steps[number * count : (number + 1) * count]
        assert sorted(b for part in mine for b in part) == list(range(20))
        groups = [{rows[b].group for b in part} for part in mine]
        assert sum(map(len, groups)) == 5  # no prompt in two parts
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert steps[:count] != steps[count:]  # another order in the second pass


def test_the_order_is_the_same_in_a_resumed_run_and_another_at_another_step() -> None:
    rows = rollouts(6, 1)
    parts = [
        [part.tolist() for part in _optimiser_steps(job(3), rows, step, 1)] for step in (4, 4, 5)
    ]  # type: ignore[union-attr]
    assert parts[0] == parts[1] != parts[2]


def test_one_minibatch_is_the_whole_batch() -> None:
    """Also where there is one group only, which is not divided, or none."""
    assert _optimiser_steps(job(1), rollouts(2, 2), 0, 3) == [None, None, None]
    assert _optimiser_steps(job(2), rollouts(1, 2), 0, 1) == [None]
    assert _optimiser_steps(job(4), [], 0, 2) == [None, None]
