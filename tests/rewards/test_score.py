"""Rewards by name, and rollouts scored with them."""

import subprocess
import sys
import threading

import pytest

from opdkit.base.errors import UserError
from opdkit.rewards import load_reward, score
from opdkit.rewards.exact import Exact
from opdkit.rewards.math import Math
from opdkit.rewards.pattern import Pattern
from opdkit.types import Rollout


def rollout(text: str, id: str = "r", finish: str = "stop", **row) -> Rollout:
    return Rollout(id, [1], [2], [True], [0.0], [0.0], "p", text=text, finish=finish, row=row)


def test_names():
    assert load_reward(None) is None
    assert load_reward("math") == Math()
    assert load_reward("exact") == Exact()
    assert load_reward("regex:is (\\d+)") == Pattern("is (\\d+)")
    assert load_reward(abs) is abs


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match=r"no reward 'maths'; did you mean 'math'\?"):
        load_reward("maths")
    with pytest.raises(UserError, match="'regex:\\(' is not a regular expression"):
        load_reward("regex:(")


def test_a_reward_of_ones_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("LIMIT = 3\ndef short(rollout):\n    return len(rollout.text) <= LIMIT\n")
    [a, b] = score([rollout("abc"), rollout("abcd")], load_reward(f"{file}:short"))
    assert (a.reward, a.correct, b.reward, b.correct) == (1.0, True, 0.0, False)
    with pytest.raises(UserError, match="is 3, not a function"):
        load_reward(f"{file}:LIMIT")


def test_exact():
    assert [Exact()(rollout(t, answer="yes ")) for t in ("yes", " yes\n", "Yes", "yes.", "")] == [
        1,
        1,
        0,
        0,
        0,
    ]


def test_pattern_takes_the_last_match():
    reward = Pattern(r"is (-?[\d.,]+\d)")
    assert reward(rollout("it is 10, no, it is 1,000", answer="1000.0")) == 1.0
    assert reward(rollout("it is 1,000, no, it is 10", answer="1000")) == 0.0
    assert reward(rollout("nothing", answer="1000")) == 0.0
    assert Pattern("yes|no")(rollout("yes yes no", answer="no")) == 1.0
    assert Pattern("a(b)?")(rollout("a", answer="b")) == 0.0


def test_score_fills_reward_and_correct_and_keeps_the_rest():
    before = [
        rollout("#### 1", id="a", answer="1"),
        rollout("#### 2", id="b", answer="1", finish="length"),
    ]
    after = score(before, Math())
    assert [(r.id, r.reward, r.correct, r.finish) for r in after] == [
        ("a", 1.0, True, "stop"),
        ("b", 0.0, False, "length"),
    ]
    assert before[0].reward is None
    assert [r.correct for r in score(before, lambda r: -1.0 if r.id == "a" else 0.5)] == [
        False,
        True,
    ]


def test_threads_keep_the_order():
    last = threading.Event()

    def first_waits_for_last(r):
        if r.id == "7":
            last.set()
        if r.id == "0":
            assert last.wait(timeout=60)
        return float(r.id)

    rollouts = [rollout("", id=str(i)) for i in range(8)]
    assert [r.reward for r in score(rollouts, first_waits_for_last, workers=2)] == [
        float(i) for i in range(8)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reward_that_raises_names_the_rollout(workers):
    def broken(r):
        return 1 / len(r.text)

    with pytest.raises(
        UserError,
        match="reward broken failed on rollout 'q7' with ZeroDivisionError: division by zero",
    ):
        score([rollout("ok", id="q6"), rollout("", id="q7")], broken, workers=workers)
    with pytest.raises(UserError, match=r"rollout 'q8': the reward 'math' compares"):
        score([rollout("5", id="q8")], Math(), workers=workers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1", [1.0]])
def test_what_is_no_reward(value):
    def odd(r):
        return value

    with pytest.raises(UserError, match=r"the reward odd returned .* for rollout 'r'"):
        score([rollout("")], odd)


def test_numpy_numbers_and_booleans_are_rewards():
    import numpy as np

    for value in (np.float32(0.5), np.int64(1), True):
        [r] = score([rollout("")], lambda _, value=value: value)
        assert type(r.reward) is float and r.correct is True


def test_importing_stays_light():
    heavy = "datasets", "pyarrow", "math_verify", "reasoning_gym", "transformers", "sympy"
    code = (
        f"import sys, opdkit.data, opdkit.rewards, opdkit.base.address; print([m for m in {heavy} "
        "if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
