"""What rewards say besides their number becomes a rollout's feedback, and is never run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opdkit.base.errors import UserError
from opdkit.rewards import load_reward, score
from opdkit.rewards.code import Code
from opdkit.rewards.jail.feedback import LONGEST
from opdkit.rewards.jail.telling import CODE, VALUE, compiled, tell
from opdkit.rewards.sandbox import Calls, Sandbox
from opdkit.types import Rollout

confined = pytest.mark.skipif(sys.platform != "linux", reason="rewards are confined by Linux")
# the program's object, whose look is the program's affair; as hostile as it gets
SLY = """
class A:
    def __repr__(self): {look}
    def __eq__(self, other): return True
def f(x): return A()
"""


def rollout(text: str, **row: Any) -> Rollout:
    return Rollout("r", [1], [2], [True], [0.0], [0.0], "p", text=text, row=row)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.5, (0.5, "")),
        (True, (1.0, "")),
        ((0.0, "too short"), (0.0, "too short")),
        ((1, None), (1.0, "")),
        ({"reward": 0.5, "feedback": "half"}, (0.5, "half")),
        ({"reward": 0.5}, (0.5, "")),
        (SimpleNamespace(reward=1.0, feedback="good"), (1.0, "good")),
    ],
)
def test_forms_of_a_reward(value: Any, told: tuple[float, str]) -> None:
    [one] = score([rollout("x")], lambda r: value)
    assert (one.reward, one.feedback) == told and one.correct == (told[0] > 0)

    @dataclass
    class Many:
        def score_many(self, rollouts: Sequence[Rollout]) -> list[Any]:
            return [value] * len(rollouts)

    assert score([rollout("x")] * 2, Many()) == [one] * 2  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["a", (1.0, 2.0), (1.0, "a", "b"), ("a", "b"), [1.0, "a"], {}])
def test_what_is_no_reward_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"cannot be averaged .* text of feedback"):
        score([rollout("x")], lambda r: value)


def test_feedback_is_cut_and_an_environments_stays() -> None:
    [one] = score([rollout("x")], lambda r: (0.0, "a" * 10_000 + "b"))
    assert len(one.feedback) <= LONGEST + 10 and one.feedback.endswith("b")
    told = replace(rollout("x"), feedback="The door is locked.")
    assert score([told], lambda r: 0.0)[0].feedback == "The door is locked."
    assert score([told], lambda r: (0.0, "new"))[0].feedback == "new"


@confined
def test_a_confined_function_may_give_feedback(tmp_path: Path) -> None:
    """The same forms as in this process, for one response and for many; words stay words."""
    (tmp_path / "mine.py").write_text(
        "def pair(rollout):\n    return 0.0, f'{rollout.text} is wrong'\ndef group(rollout):\n    "
        "return {'reward': 1, 'feedback': rollout.text}\ndef plain(rollout):\n    return 1.0\ndef "
        "bad(rollout):\n    return 1.0, 2.0\nclass Batch:\n    def score_many(self, rollouts):\n"
        "        return [(0.5, r.text) for r in rollouts]\nbatch = Batch()\n"
    )
    tmp_path.chmod(0o777)
    text = "__import__('os').system('touch x')"

    def told(name: str) -> tuple[float | None, str]:
        [one] = score([rollout(text)], load_reward(f"{tmp_path / 'mine.py'}:{name}"))
        return one.reward, one.feedback

    assert told("pair") == (0.0, f"{text} is wrong") and told("group") == (1.0, text)
    assert told("plain") == (1.0, "") and told("batch") == (0.5, text)
    with pytest.raises(UserError, match=r"returned \(1.0, 2.0\) \(tuple\)"):
        told("bad")


# ------------------------------------------------------------------------------------------- tests


HUMAN_EVAL = {
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(3) == 6\n",
}


@confined
@pytest.mark.parametrize(
    ("row", "program", "said"),
    [
        ({"tests": "assert f(2) == 4"}, "def f(x): return x + 1", "f(2) gives 3 and not 4"),
        (HUMAN_EVAL, "def double(x): return x + 1", "candidate(3) gives 4 and not 6"),
        (
            {"input_output": {"fn_name": "f", "inputs": [[1, 2]], "outputs": [[3]]}},
            "def f(a, b): return a * b",
            "_function(*[1, 2]) gives 2 and not [3]",
        ),
        (
            {"input_output": {"inputs": ["2\n"], "outputs": ["4"]}},
            "print(int(input()) + 3)",
            "it prints '5\\n' and not '4' for the input '2\\n'",
        ),
        ({"tests": "assert f(2) == 4"}, "def f(x): return 1 / 0", "ZeroDivisionError"),
        ({"tests": "assert f(2) == 4, 'my words'"}, "def f(x): return 5", "my words"),
        ({"tests": "assert f(2) > 4"}, "def f(x): return 3", "assert f(2) > 4"),
        ({"tests": "assert f(2) == 4"}, "def f(x) return 3", "SyntaxError"),
    ],
)
def test_the_first_failed_test_says_what_came_and_what_was_expected(
    row: dict[str, Any], program: str, said: str
) -> None:
    [one] = score([rollout(f"```python\n{program}\n```", **row)], Code(workers=1))
    assert one.reward == 0.0 and said in one.feedback, one.feedback


@confined
def test_a_right_program_has_no_feedback_and_partial_credit_tells_the_first() -> None:
    row = {"tests": "assert f(1) == 1\nassert f(2) == 4\nassert f(3) == 10"}
    program = "```python\ndef f(x): return x * x\n```"
    [one] = score([rollout(program, **row)], Code(workers=1, partial=True))
    assert one.reward == 2 / 3 and "f(3) gives 9 and not 10" in one.feedback
    good = rollout(program, tests="assert f(1) == 1")
    assert score([good], Code(workers=1))[0].feedback == ""


@confined
@pytest.mark.parametrize(
    "look", ["return 'x' * 10**7", "raise SystemExit", "return 3", "import os; os._exit(0)"]
)
def test_a_programs_object_that_shows_itself_fails_all_the_same(look: str) -> None:
    [verdict] = Sandbox(workers=1).run(
        [Calls((SLY.format(look=look),), ("assert f(3) == 4", "assert f(3) == 4"), ("f",))]
    )
    assert verdict.passed == 0 and len(verdict.why) < 1000


def test_a_test_that_tells_evaluates_the_same_in_the_same_order() -> None:
    """Also inside functions and classes; other statements are as they were."""
    source = (
        "def left():\n    calls.append('left')\n    return 1\ndef right():\n    "
        "calls.append('right')\n    return 2\ndef check(candidate):\n    assert candidate() == "
        "right()\nclass A:\n    assert left() == 1\nassert left() == sum(x for x in [1])\nassert 1 "
        "< 2 == 2\ntry:\n    check(left)\nexcept AssertionError as error:\n    said = str(error)\n"
    )
    names: dict[str, Any] = {"calls": [], "_opdkit_tell": tell}
    exec(compiled(source, "x.py"), names)
    assert names["said"] == "candidate() gives 1 and not 2"
    plain: dict[str, Any] = {"calls": []}
    exec(compile(source, "x.py", "exec"), plain)
    assert names["calls"] == plain["calls"] == ["left", "left", "left", "right"]
    long = tell("f(" + "1" * 500 + ")"[:CODE], "a" * 500, [1] * 500)
    assert len(long) < 503 + 2 * VALUE + 20
