"""What an environment is: a world that is opened by a row of the data, answers actions, ends, and
says what an episode was worth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from opdkit.environments.calls import CallFormat
from opdkit.types import DataRow

Message = dict[str, Any]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Scored:
    """What an episode was worth.

    Arguments:
        reward: any finite number; 1 for right and 0 for wrong by convention.
        correct: whether it reached its goal; None: where the reward is above 0.
        feedback: what there is to say of it, for teachers that read that.
    """

    reward: float
    correct: bool | None = None
    feedback: str = ""


class Environment(ABC):
    """One episode's world. A new one is made for each episode.

    Here one in which a number is to be guessed, whole:

        class Guess(Environment):
            def reset(self, row, seed):
                self.number, self.last = row["number"], None
                return "I think of a number from 1 to 9. Which?"

            def step(self, action):
                self.last = int(action) if action.strip().isdigit() else None
                return "higher" if self.last is None or self.last < self.number else "lower"

            @property
            def done(self):
                return self.last == self.number

            def score(self):
                return float(self.done)
    """

    # functions that the student may call, as JSON schemas, written by its chat template
    tools: Sequence[Mapping[str, Any]] = ()
    # how the student's template writes calls of them; said before `reset`
    calls: CallFormat = CallFormat()
    # whether `step` is told the student's thoughts too; else its action begins after them
    thoughts: ClassVar[bool] = False

    @abstractmethod
    def reset(self, row: DataRow, seed: int) -> str | list[Message]:
        """Opens the episode: what the student reads first, as the user's text or as messages.

        Arguments:
            row: of the data; its prompt, its answer, the game's file.
            seed: the same for an episode that is lived again in a resumed run.
        """

    @abstractmethod
    def step(self, action: str) -> str | Message | list[Message]:
        """What the world answers to one turn of the student's: a user's text, or messages (such as
        {"role": "tool", "content": ...}).

        Arguments:
            action: the turn as the student wrote it, decoded, without what ends it, its thoughts
                and the white space around it.
        """

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the episode has ended: nothing is asked after that."""

    @abstractmethod
    def score(self) -> float | Scored:
        """What the episode was worth so far; also of one that was stopped before its end."""

    def close(self) -> None:
        """Lets go of processes and files."""
        return
