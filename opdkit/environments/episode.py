"""One episode as it is lived: a world, whatever its author's code does, and what was written in it
so far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from opdkit.base.errors import UserError, shown
from opdkit.base.own_code import own_code
from opdkit.data.messages import as_messages, is_messages
from opdkit.environments.base import Environment, Message, Scored
from opdkit.environments.dialogue import Dialogue
from opdkit.rewards.extract import after_thinking
from opdkit.types import DataRow, Prompt, Turn

STEP_SECONDS = 600.0  # for one call of an environment's code


@dataclass
class Part:
    """Consecutive tokens of one author."""

    turn: int
    tokens: list[int]
    mark: str = ""  # who wrote them: "tool", "given"; "": the student drew them


@dataclass
class Episode:
    """What is written between a student and one environment.

    Arguments:
        name: of the environment, in errors.
        environment: its world.
        dialogue: writes for the student.
        prompt: whose row opens it.
        limit: turns after which it is stopped; None: none.
        stop: texts that end a turn.
    """

    name: str
    environment: Environment
    dialogue: Dialogue
    prompt: Prompt
    limit: int | None
    stop: Sequence[str] = ()
    turn: int = 0  # of the student's next words
    parts: list[Part] = field(default_factory=list)
    row: DataRow = field(default_factory=dict)  # the prompt's, with what its opening asks
    opening: list[int] = field(default_factory=list)
    finish: str = ""  # as `Rollout.finish`, once it has ended

    @property
    def tokens(self) -> list[int]:
        """All that was written after the opening."""
        return [token for part in self.parts for token in part.tokens]

    # ----------------------------------------------------------------------------------- its course

    def open(self, seed: int, room: int) -> None:
        """Resets the world, and replays what another did in it first, where the student is left
        something to do after that within `room` tokens.
        """
        self._reset(seed)
        for action in self.prompt.replay:
            said = self.dialogue.action(action, self.stop)
            reply = self._answered(action, said, "given", room)
            if reply is None or len(self.tokens) + len(reply) >= room:
                self.turn, self.parts, self.finish = 0, [], ""
                self._reset(seed)
                return
            self._write(reply, "tool")

    def go_on(self, turn: Turn) -> list[int] | None:
        """What the world answers to a turn of the student's; None where the episode has ended."""
        said = self.dialogue.said(turn.tokens, self._before(), self.stop)
        self.finish = "stop" if turn.stopped else "length"  # where there is no room to go on
        action = said if self.environment.thoughts else after_thinking(said)
        reply = self._answered(action, turn.tokens, "", turn.room)
        if reply is None:
            return None
        if len(reply) >= turn.room:
            self.finish = "length"
            return None
        self._write(reply, "tool")
        return reply

    def _answered(self, action: str, tokens: list[int], mark: str, room: int) -> list[int] | None:
        """Takes a turn to the world; its answer, None where the episode ends with that turn."""
        self.parts.append(Part(self.turn, tokens, mark))
        with self._own("step"):
            given = self.environment.step(action)
        said = self._messages(given, "step")
        if self._done():
            self.finish = "stop"
            return None
        if self.limit is not None and self.turn + 1 >= self.limit:
            self.finish = "turns"
            return None
        return self.dialogue.reply(said, self.environment.tools, tokens, self.where)

    def _write(self, reply: list[int], mark: str) -> None:
        self.parts.append(Part(self.turn, reply, mark))
        self.turn += 1

    def _before(self) -> list[int]:
        return self.parts[-1].tokens if self.parts else self.opening

    # --------------------------------------------------------------------------- its author's code

    @property
    def where(self) -> str:
        """Its place, for errors."""
        row = f"the row {self.prompt.question!r}" if self.prompt.question else "its row"
        return f"environment {self.name}, in turn {self.turn} of an episode of {row}"

    def _own(self, part: str) -> AbstractContextManager[None]:
        return own_code(f"{self.where}: its {part} fails", seconds=STEP_SECONDS)

    def _reset(self, seed: int) -> None:
        self.environment.calls = self.dialogue.calls
        with self._own("reset"):
            # a copy: whatever it does with its row, the next episode of that row begins alike
            given = self.environment.reset(copy.deepcopy(self.prompt.row), seed)
        messages = self._messages(given, "reset")
        asked = self.dialogue.asked(messages, self.environment.tools)
        self.row = {**self.prompt.row, **asked}
        self.opening = self.dialogue.opening(self.row, self.where)
        if self._done():
            raise UserError(
                f"{self.where}: it is done before the student has written anything. Let reset open "
                "an episode in which there is something to do, or take the row out"
            )

    def _messages(self, given: Any, part: str) -> list[Message]:
        """What an environment returned, as messages."""
        if isinstance(given, str):
            return [{"role": "user", "content": given}]
        listed = [given] if isinstance(given, Mapping) else given
        if not is_messages(listed):
            raise UserError(
                f"{self.where}: its {part} returned {shown(given)} ({type(given).__name__}), and "
                "the student reads text: return a text, or messages such as "
                '{"role": "tool", "content": "42"}'
            )
        messages = as_messages(listed, self.where)
        if part == "step" and any(m["role"] == "assistant" for m in messages):
            raise UserError(
                f"{self.where}: its step returned a message of the role assistant, which is the "
                "student's own. Answer as user or tool"
            )
        return messages

    def _done(self) -> bool:
        with self._own("done"):
            done = _item(self.environment.done)
        if callable(done) or not isinstance(done, bool | int):
            raise UserError(
                f"{self.where}: its done is {shown(done)}, neither true nor false: make it a "
                "property (@property) that returns a bool, or an attribute"
            )
        return bool(done)

    def scored(self) -> Scored:
        """What it was worth."""
        with self._own("score"):
            given = _item(self.environment.score())
        score: Any = Scored(float(given)) if isinstance(given, Real) else given
        number = _item(getattr(score, "reward", None))
        if not isinstance(number, Real) or not math.isfinite(number):
            raise UserError(
                f"{self.where}: its score returned {shown(given)} ({type(given).__name__}), which "
                "cannot be averaged or compared: return a finite float, 1.0 for right and 0.0 for "
                "wrong, or Scored(reward, correct, feedback)"
            )
        right = _item(getattr(score, "correct", None))
        said = getattr(score, "feedback", "")
        if not isinstance(right, bool | int | None) or not isinstance(said, str | None):
            raise UserError(
                f"{self.where}: its score returned correct={shown(right)} and feedback="
                f"{shown(said)}: `correct` is true or false (None: whether the reward is above 0), "
                "and `feedback` the text that a teacher reads"
            )
        reward = float(number)
        return Scored(reward, reward > 0 if right is None else bool(right), said or "")

    def close(self) -> None:
        with self._own("close"):
            self.environment.close()


def _item(value: Any) -> Any:
    """A number or truth of numpy or torch as Python's own."""
    return value.item() if math.prod(getattr(value, "shape", (0,))) == 1 else value
