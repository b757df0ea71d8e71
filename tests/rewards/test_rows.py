"""A reward says of its rows, before any model is loaded, which it could not score."""

from __future__ import annotations

from typing import Any

import pytest

from opdkit.base.errors import UserError
from opdkit.rewards.code import Code
from opdkit.rewards.exact import Exact
from opdkit.rewards.gym import ReasoningGym
from opdkit.rewards.math import Math
from opdkit.rewards.rows import check_rows

GOOD = [{"id": str(i), "prompt": "2?", "answer": "4"} for i in range(9)]


@pytest.mark.parametrize("reward", [Math(), Exact()])
@pytest.mark.parametrize("answer", [None, "", "  "])
def test_the_tenth_row_without_an_answer_is_named(reward: Any, answer: str | None) -> None:
    check_rows(reward, GOOD)
    with pytest.raises(UserError, match=r"^row '9': the reward '\w+' compares"):
        check_rows(reward, [*GOOD, {"id": "9", "prompt": "2?", "answer": answer}])


def test_rows_without_tests_or_a_task() -> None:
    with pytest.raises(UserError, match=r"^row '0': the reward 'code' reads tests"):
        check_rows(Code(), GOOD)
    with pytest.raises(UserError, match=r"^row '0': the reward reasoning_gym reads the task's"):
        check_rows(ReasoningGym(), GOOD)


def test_a_reward_of_one_s_own_may_say_so_and_need_not() -> None:
    class Picky:
        def check_row(self, row: Any) -> None:
            raise KeyError("image")

    check_rows(lambda rollout: 1.0, GOOD)
    with pytest.raises(UserError, match=r"row '0' cannot be scored: KeyError: 'image'"):
        check_rows(Picky(), GOOD)
