"""Methods that learn from rewards in whole runs: ten steps from the command line, with all weights
and with adapters; and killed in the middle they go on as if they had not been.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Shop
from tests.end_to_end.crash import assert_same, in_child
from tests.end_to_end.test_training import check_trained

GRADED = """
def graded(rollout):
    # so that a prompt's responses are seldom worth the same
    return sum(rollout.tokens) % 7 / 6
"""
METHODS = (
    "dgpo",
    "gtpo",
    "gtpo(official_code=True)",
    "dmpo",
    "dmpo(score=teacher)",
    "rapo",
    "rapo(kl_grad=score)",
    "apo",
    "fg_expo",
)


@pytest.mark.parametrize("lora", [(), ("lora.r=4",)], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps(shop: Shop, tmp_path: Path, method: str, lora: tuple[str, ...]) -> None:
    (tmp_path / "reward.py").write_text(GRADED)
    reward = f"--reward={tmp_path / 'reward.py'}:graded"
    flags = (f"--method={method}", reward, "steps=10", "num_generations=4", *lora)
    assert shop.train(tmp_path / "run", *flags) == 0
    check_trained(tmp_path / "run", shop.student, 10)


# what remembers something itself; of the others it is the student alone that goes on
REMEMBER = ("gtpo", "fg_expo")


@pytest.mark.parametrize(
    "method", [m if m in REMEMBER else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_killed_and_resumed_it_is_the_run_that_was_never_killed(
    shop: Shop, tmp_path: Path, method: str
) -> None:
    values = shop.values(
        tmp_path / "killed",
        method=method,
        reward=shop.reward,
        steps=4,
        optim={"passes": 2},
        checkpoint={"every": 1, "keep": 9},
    )
    assert in_child(values, moment="before the optimiser", step=3) == -9
    assert in_child(values, resume=True) == 0
    assert in_child({**values, "output": str(tmp_path / "whole")}) == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")
