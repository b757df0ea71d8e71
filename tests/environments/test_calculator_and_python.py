"""The environments that ship with tools: what a student may have worked out, and what its answer is
worth.
"""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkit.base.errors import UserError
from opdkit.environments import Dialogue
from opdkit.environments.calculator import worked_out
from opdkit.environments.kinds import environment_of
from tests.common.tiny import TEMPLATE
from tests.environments.templates import QWEN3, chatting

ROW = {"id": "r", "prompt": "What is 6 times 7?", "answer": "42"}
NUMBERS = st.integers(0, 99).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(" ".join),
        inner.map(lambda e: f"({e})"),
        inner.map(lambda e: f"-{e}"),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS)
def test_a_value_is_that_of_python(expression: str) -> None:
    try:
        wanted = eval(expression)  # made here, of digits and signs
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="zero"):
            worked_out(expression)
        return
    assert math.isclose(worked_out(expression), wanted, rel_tol=1e-9, abs_tol=1e-9)


def test_powers_thousands_and_signs_of_books() -> None:
    assert [worked_out(e) for e in ("2**3**2", "-2**2", "2 ** -1", "1,234 × 2", "9 ÷ 4 =")] == [
        512,
        -4,
        0.5,
        2468,
        2.25,
    ]
    assert worked_out("0.1 + 0.2") == 0.3 and worked_out("6.0 * 7") == 42


@pytest.mark.parametrize(
    "text",
    [
        *("", "(1", "1)", "1 2", "3+", "*3", "()", "9**9**9", "(-8)**0.5", "1/0", "2 ** 99999"),
        *("__import__('os')", "a.b", "1;2", "lambda: 1", "(" * 300, "1+" * 300 + "1", "9e99*9e99"),
    ],
)
def test_what_is_no_arithmetic_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        worked_out(text)


def test_a_calculator_in_a_templates_own_form_and_in_lines() -> None:
    calculator = environment_of("calculator")
    one = calculator.make()
    one.calls = Dialogue(chatting(QWEN3)).calls
    assert one.reset(ROW, 0) == ROW["prompt"] and one.tools[0]["function"]["name"] == "calculate"
    call = '{"name": "calculate", "arguments": {"expression": "6*7"}}'
    assert one.step(f"<tool_call>\n{call}\n</tool_call>")[0]["content"] == "42"
    assert not one.done
    one.step("The answer is 42.")
    assert one.done and one.score() == 1.0
    plain = calculator.make()
    plain.calls = Dialogue(chatting(TEMPLATE)).calls
    opening = plain.reset(ROW, 0)
    assert opening.startswith(ROW["prompt"]) and "calc:" in opening and plain.tools == ()
    assert plain.step("First\ncalc: 6*7\n calc: 1/0") == "6*7 = 42\nerror: it divides by zero"
    plain.step("41")
    assert plain.done and plain.score() == 0.0
    unasked = calculator.make()
    unasked.reset(ROW, 0)
    assert unasked.score() == 0.0  # stopped before it answered


@pytest.mark.skipif(sys.platform != "linux", reason="programs are confined on Linux only")
def test_programs_run_in_the_sandbox() -> None:
    world = environment_of({"kind": "python", "seconds": 2})
    world.check()
    one = world.make()
    one.calls = Dialogue(chatting(TEMPLATE)).calls
    assert "```python" in one.reset(ROW, 0)
    said = [
        one.step(f"```python\n{code}\n```")
        for code in ("x = 6\nx * 7", "1 / 0", "open('/etc/passwd').read()", "def f(:", "x")
    ]
    assert said[0].strip() == "42" and "ZeroDivisionError" in said[1] and "SyntaxError" in said[3]
    assert "Error" in said[2] and "root:" not in said[2]
    assert "NameError" in said[4]  # each program begins anew
    one.step("It is 42")
    assert one.done and one.score() == 1.0


def test_settings_of_kinds() -> None:
    with pytest.raises(UserError, match=r"seconds=0"):
        environment_of({"kind": "python", "seconds": 0})
    with pytest.raises(UserError, match=r"turn_tokens=0.*at least 1"):
        environment_of({"kind": "calculator", "turn_tokens": 0})
    with pytest.raises(UserError, match="did you mean"):
        environment_of("calculatr")
    with pytest.raises(UserError, match="nothing may follow"):
        environment_of("calculator:5")
