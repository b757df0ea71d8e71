"""A response against another: judges of two answers, and rewards of which the higher wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opdkit.base.errors import UserError
from opdkit.rewards import load_reward, score
from opdkit.rewards.against import Beats, beside, compares
from opdkit.rewards.exact import Exact
from opdkit.types import Rollout

JUDGE = '''
import os


def shorter(row, a, b):
    """The shorter answer, half where they are as long."""
    assert sorted(row) == ["answer", "id"]
    return 0.5 if len(a) == len(b) else float(len(a) < len(b))


def sure(row, a, b, doubt=0.1):
    return {"reward": 1 - doubt, "feedback": f"{a} is not {b}"}


def alone(rollout, scale=1.0, shift=0.0):
    return scale * len(rollout.text) + shift


def beyond(row, a, b):
    return 1.5


def words(row, a, b):
    return "the first"


def peeks(row, a, b):
    return float(len(os.listdir("/")) > 0)


sure.confined = False
'''


def rollout(text: str, other: str, number: int = 0) -> Rollout:
    opponent = {"by": "anchor", "text": other, "tokens": [9] * len(other), "finish": "length"}
    row = {"id": "q", "answer": "four", "opponent": opponent}
    return Rollout(
        f"0/q/{number}", [1], [3] * len(text), [True] * len(text), [-1.0] * len(text),
        [-1.0] * len(text), "q", text=text, row=row,
    )  # fmt: skip


ROLLOUTS = [rollout(a, b, i) for i, (a, b) in enumerate((("a", "abc"), ("abc", "a"), ("ab", "cd")))]


@pytest.fixture
def judge(tmp_path: Path) -> Any:
    file = tmp_path / "judge.py"
    file.write_text(JUDGE)
    return lambda name: load_reward(f"{file}:{name}")


def worth(reward: Any) -> list[tuple[float | None, bool | None]]:
    return [(r.reward, r.correct) for r in score(ROLLOUTS, Beats(reward))]


def test_a_judge_of_two_says_how_probably_the_first_is_better(judge: Any) -> None:
    """In a confined process, which is told the row without the opponent, and both texts."""
    assert compares(judge("shorter"))
    assert worth(judge("shorter")) == [(1.0, True), (0.0, False), (0.5, False)]


def test_what_it_says_besides_is_feedback(judge: Any) -> None:
    made = score(ROLLOUTS[:1], Beats(judge("sure")))
    assert made[0].reward == 0.9 and made[0].feedback == "a is not abc" and made[0].correct


def test_of_any_other_reward_the_higher_wins(judge: Any) -> None:
    assert not compares(judge("alone"))
    assert worth(judge("alone")) == [(0.0, False), (1.0, True), (0.5, False)]
    assert worth(lambda r: -len(r.tokens)) == [(1.0, True), (0.0, False), (0.5, False)]
    right = [rollout("four", "five"), rollout("five", "four"), rollout("four", "four")]
    assert [r.reward for r in score(right, Beats(Exact()))] == [1.0, 0.0, 0.5]


def test_the_opponents_response_is_one_like_others() -> None:
    other = beside(ROLLOUTS[0])
    assert other.text == "abc" and other.tokens == [9] * 3 and other.finish == "length"
    assert other.row == ROLLOUTS[0].row and other.id != ROLLOUTS[0].id and not any(other.trained)


def test_both_sides_are_worth_one_together() -> None:
    """P(y > y') + P(y' > y) = 1, of any reward."""
    for a, b in (("a", "abc"), ("ab", "cd"), ("", "x")):
        there, back = (
            score([rollout(*p)], Beats(lambda r: len(r.text)))[0] for p in ((a, b), (b, a))
        )
        assert there.reward + back.reward == 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "said"),
    [("beyond", r"beyond returned 1.5 .*a number in \[0, 1\]"), ("words", "words.*'the first'")],
)
def test_what_is_no_probability_is_refused(judge: Any, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        score(ROLLOUTS, Beats(judge(name)))


def test_a_judge_reads_what_a_model_wrote_in_confinement(judge: Any) -> None:
    with pytest.raises(UserError, match="the reward peeks failed"):
        score(ROLLOUTS, Beats(judge("peeks")))
