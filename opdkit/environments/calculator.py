"""A calculator beside a question: the student may have numbers worked out before it answers."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opdkit.environments.base import Environment, Message
from opdkit.environments.settings import EnvironmentSettings
from opdkit.environments.tools import ToolEnvironment, tool
from opdkit.rewards.score import load_reward, score
from opdkit.types import DataRow, Rollout

CALC = tool(
    "calculate", "Works out an arithmetic expression.", expression="string: such as (3 + 4) * 2.5"
)
LINE = re.compile(r"^\s*calc:\s*(\S.*?)\s*$", re.MULTILINE)
HINT = "To have a number worked out, write a line such as calc: (3 + 4) * 2 and end your turn."
SIGNS: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
    "//": (2, operator.floordiv),
    "%": (2, operator.mod),
    "**": (4, pow),
}
NEGATED = 3  # binds closer than a product, less close than a power
TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?(?:[eE][-+]?\d{1,3})?|\.\d+)|(\*\*|//|[-+*/%()]))")
LONGEST, LARGEST = 400, 1e100  # characters, and what a number may be


def worked_out(expression: str) -> float | int:
    """The value of an arithmetic expression of plain numbers; ValueError where it is none.

    Nothing is evaluated as Python: numbers and signs are read one by one, onto two stacks.

    >>> worked_out("2 * (3 + 4) - -1"), worked_out("2 ** 3 ** 2"), worked_out("1,000 / 8")
    (15, 512, 125)
    """
    text = re.sub(r"(?<=\d),(?=\d{3})", "", expression.strip().removesuffix("="))
    text = text.replace("×", "*").replace("÷", "/").replace("^", "**").replace("−", "-")
    if not text.strip() or len(text) > LONGEST:
        raise ValueError(f"give an expression of 1 to {LONGEST} characters")
    values: list[float | int] = []
    signs: list[str] = []
    at, operand = 0, True  # whether a number is due
    while text[at:].strip():
        found = TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"{text[at:].strip()[:20]!r} is no number or sign")
        number, sign = found.groups()
        at = found.end()
        if (number is not None or sign == "(") != operand and not (operand and sign in ("-", "+")):
            raise ValueError(f"{(number or sign)!r} stands where it cannot")
        if number is not None:
            values.append(float(number) if re.search(r"[.eE]", number) else int(number))
            operand = False
        elif operand:
            signs.append("(" if sign == "(" else f"neg{sign}")
        else:
            operand = _reduce(values, signs, sign)
    if operand:
        raise ValueError("it ends before its last number")
    _reduce(values, signs, "")
    return _plain(values[0])


def _reduce(values: list[float | int], signs: list[str], sign: str) -> bool:
    """Does what binds at least as closely as a sign that comes next (")" or "": all that is open);
    whether a number is due after it.
    """
    level = SIGNS[sign][0] if sign in SIGNS else 0
    while signs and signs[-1] != "(":
        last = signs[-1]
        held = SIGNS[last][0] if last in SIGNS else NEGATED
        if held < level or (held == level and sign == "**"):
            break
        signs.pop()
        if last in SIGNS:
            b, a = values.pop(), values.pop()
            values.append(_applied(last, a, b))
        elif last == "neg-":
            values.append(-values.pop())
    if sign == ")":
        if not signs:
            raise ValueError("a bracket closes that was not opened")
        signs.pop()
        return False
    if sign == "" and signs:
        raise ValueError("a bracket is not closed")
    signs.append(sign)
    return True


def _applied(sign: str, a: float | int, b: float | int) -> float | int:
    if sign == "**" and (abs(b) > 1000 or (a not in (0, 1, -1) and abs(b) * _digits(a) > 100)):
        raise ValueError("the power is too large")
    try:
        value = SIGNS[sign][1](a, b)
    except ZeroDivisionError:
        raise ValueError("it divides by zero") from None
    if isinstance(value, complex) or abs(value) > LARGEST:
        raise ValueError("the value is too large, or no real number")
    return value


def _digits(value: float | int) -> float:
    return len(str(int(abs(value)))) if abs(value) >= 1 else 1


def _plain(value: float | int) -> float | int:
    """A whole number without a point, others without the noise of the last digits."""
    rounded = round(float(value), 10)
    if isinstance(value, int):
        return value
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


class Calculator(ToolEnvironment):
    """The row's prompt, a function `calculate` in the form of the student's template (or lines
    `calc: ...`, which every model can write), and an answer that the math reward compares.
    """

    offered, hint = CALC, HINT

    def reset(self, row: DataRow, seed: int) -> str | list[Message]:
        self.row, self.reward = row, load_reward("math")
        self.tools = (self.offered,) if self.calls.known else ()
        prompt = row["prompt"]
        return f"{prompt}\n{self.hint}" if isinstance(prompt, str) and not self.tools else prompt

    def step(self, action: str) -> str | Message | list[Message]:
        lines = LINE.findall(action)
        if not lines or self.calls.read(action):
            return super().step(action)
        return "\n".join(self._line(line) for line in lines)

    def _line(self, line: str) -> str:
        try:
            return f"{line} = {self.calculate(line)}"
        except ValueError as error:
            return f"error: {error}"

    def calculate(self, expression: str) -> str:
        return str(worked_out(expression))

    def score(self) -> float:
        assert self.reward is not None
        said = Rollout("answer", [], [], [], [], [], "answer", text=self.answer or "", row=self.row)
        return score([said], self.reward)[0].reward or 0.0


@dataclass(frozen=True)
class CalculatorSettings(EnvironmentSettings):
    """Questions with a number as answer (data with columns prompt and answer), and a calculator."""

    kind = "calculator"

    def make(self) -> Environment:
        return Calculator()

    def check(self) -> None:
        load_reward("math")
