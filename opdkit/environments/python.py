"""Python beside a question: the student may have a program run before it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from opdkit.base.rules import Rules, at_least, follow
from opdkit.environments.base import Environment, Message
from opdkit.environments.calculator import Calculator
from opdkit.environments.settings import EnvironmentSettings
from opdkit.environments.tools import tool
from opdkit.rewards.sandbox import Limits, Sandbox
from opdkit.rewards.score import load_reward

PYTHON = tool(
    "python",
    "Runs a program and returns what it prints. Each begins anew.",
    code="string: the program",
)
BLOCK = re.compile(r"```(?:python|py)\s*\n(.*?)(?:```|\Z)", re.DOTALL)
HINT = "To have a program run, write it in a block that begins with ```python, and end your turn."
LIMITS: Rules = {
    "seconds": at_least(1, "it is how long a program may compute"),
    "memory": at_least(64, "it is the MiB that a program may take"),
}


class Python(Calculator):
    """The row's prompt, a function `python` in the form of the student's template (or blocks
    ```python), and an answer that the math reward compares. Programs run in the sandbox.
    """

    offered, hint = PYTHON, HINT

    def __init__(self, sandbox: Sandbox):
        self.sandbox = sandbox

    def step(self, action: str) -> str | Message | list[Message]:
        blocks = BLOCK.findall(action)
        if not blocks or self.calls.read(action):
            return super(Calculator, self).step(action)
        return "\n".join(self.python(block) for block in blocks)

    def python(self, code: str) -> str:
        return self.sandbox.output(code) or "(nothing was printed)"


@dataclass(frozen=True)
class PythonSettings(EnvironmentSettings):
    """Questions with a number as answer (data with columns prompt and answer), and a sandbox.

    seconds, memory (MiB): what a program may use.
    """

    kind = "python"
    seconds: int = 5
    memory: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        follow(LIMITS, self)

    def make(self) -> Environment:
        return Python(self._sandbox)

    def check(self) -> None:
        load_reward("math")
        self._sandbox.check()

    @property
    def _sandbox(self) -> Sandbox:
        return Sandbox(Limits(self.seconds, self.memory))
