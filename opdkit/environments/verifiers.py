"""Environments of the library `verifiers` (SingleTurnEnv, ToolEnv, MultiTurnEnv and what is built
on them), with their own data and rubrics.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from opdkit.base.address import is_address, load_address, path_of
from opdkit.base.errors import UserError
from opdkit.base.own_code import FILE_SECONDS, own_code
from opdkit.data.columns import text
from opdkit.environments.base import Environment, Message, Scored
from opdkit.environments.calls import call_id
from opdkit.environments.settings import EnvironmentSettings
from opdkit.rewards.extract import after_thinking
from opdkit.types import DataRow

INPUT = "verifiers"  # column of a row: the input of a rollout, as the library's data set has it


class Verifiers(Environment):
    """One rollout of such an environment, turn by turn: its stop conditions are asked before each
    turn, and its rubric scores what was said.
    """

    thoughts = True  # parsers of its rubrics look for them

    def __init__(self, world: Any):
        self.world, self.loop = world, asyncio.new_event_loop()
        self.tools = tuple(map(_schema, world.tool_defs or ()))
        self.over, self.said = False, 0

    def reset(self, row: DataRow, seed: int) -> str | list[Message]:
        given = row.get(INPUT) or {
            k: v for k, v in row.items() if k in ("prompt", "answer", "info")
        }
        self.state = self._wait(
            self.world.init_state({"example_id": 0, **given}, _nobody(), "student")
        )
        self._wait(self.world.setup_state(self.state))
        return [_message(m) for m in self._next()]

    def _next(self) -> list[Any]:
        """Messages that were added since the student's last turn; all of them before the first."""
        if self._wait(self.world.is_completed(self.state)):
            self.over = True
            return []
        self.asked = self._wait(self.world.get_prompt_messages(self.state))
        # an environment may answer and end with that
        self.over = self.state.get("final_env_response") is not None
        new, self.said = list(self.asked)[self.said :], len(self.asked) + 1
        return new

    def step(self, action: str) -> str | Message | list[Message]:
        from verifiers.types import AssistantMessage, ToolCall

        calls = [
            ToolCall(
                id=call_id(number),
                name=call.name,
                arguments=call.error or json.dumps(call.arguments),
            )
            for number, call in enumerate(self.calls.read(after_thinking(action)))
        ]
        said = AssistantMessage(content=action, tool_calls=calls or None)
        turn = {
            "prompt": self.asked,
            "completion": [said],
            "response": None,
            "tokens": None,
            "reward": None,
            "advantage": None,
            "is_truncated": False,
            "trajectory_id": self.state["trajectory_id"],
            "extras": {},
        }
        self._wait(self.world.add_trajectory_step(self.state, turn))
        return [_message(m) for m in self._next()] or ""

    @property
    def done(self) -> bool:
        return self.over

    def score(self) -> Scored:
        self._wait(self.world.render_completion(self.state))
        self._wait(self.world.rubric.score_rollout(self.state))
        metrics = {k: v for k, v in (self.state["metrics"] or {}).items() if v}
        told = ", ".join(f"{name}: {value:g}" for name, value in metrics.items())
        return Scored(float(self.state["reward"]), None, told)

    def close(self) -> None:
        if hasattr(self, "state"):
            self._wait(self.world.cleanup(self.state))
        self.loop.close()

    def _wait(self, task: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(task)


def _schema(tool: Any) -> dict[str, Any]:
    """One of its functions, as chat templates write them."""
    function = {name: getattr(tool, name) for name in ("name", "description", "parameters")}
    return {"type": "function", "function": function}


def _message(message: Any) -> Message:
    """One of its messages, with text as content."""
    given = message if isinstance(message, dict) else message.model_dump(exclude_none=True)
    return {**given, "content": text(given.get("content"))}


def _nobody() -> Any:
    """A client that is asked nothing: the student writes by itself."""
    from verifiers.clients import Client

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the student is not asked through a client")

    names = getattr(Client, "__abstractmethods__", ())
    return object.__new__(type("Nobody", (Client,), dict.fromkeys(names, refuse)))


@dataclass(frozen=True)
class VerifiersSettings(EnvironmentSettings):
    """An environment by the name under which it is installed, or the function of a file that makes
    one (file.py:load_environment), with its arguments.
    """

    kind = "verifiers"
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        return {"name": text}

    def make(self) -> Environment:
        return Verifiers(self._world)

    def rows(self) -> list[DataRow]:
        rows = [dict(row) for row in self._world.get_dataset()]
        return [
            {"id": str(row.get("example_id", i)), **row, INPUT: row} for i, row in enumerate(rows)
        ]

    def check(self) -> None:
        if importlib.util.find_spec("verifiers") is None:
            raise UserError(
                "environment verifiers needs the package verifiers, which is not installed: pip "
                "install 'opdkit[verifiers]'"
            )
        if not hasattr(self._world, "add_trajectory_step"):
            raise UserError(
                f"environment {self.name!r} is a {type(self._world).__name__}, which takes no "
                "turns one by one: use one that is built on SingleTurnEnv, ToolEnv or MultiTurnEnv"
            )

    @property
    def _world(self) -> Any:
        return _loaded(self.name, json.dumps(self.arguments, sort_keys=True))


@cache
def _loaded(name: str, arguments: str) -> Any:
    """The library's environment, made once: what belongs to an episode is in its state."""
    import verifiers

    with own_code(f"environment {name!r} cannot be loaded", path_of(name), FILE_SECONDS):
        given = json.loads(arguments)
        if is_address(name):
            return load_address(name)(**given)
        return verifiers.load_environment(name, **given)
