"""What every kind of environment says of itself: its settings, as a run names them, how one is made
for an episode, and the tasks that it makes of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from opdkit.base.rules import Rules, at_least, follow
from opdkit.environments.base import Environment
from opdkit.types import DataRow

LIMITS: Rules = {
    "max_turns": at_least(
        1, "it is the turns after which an episode is stopped", null="as many as there is room for"
    ),
    "turn_tokens": at_least(
        1, "it is the tokens after which a turn is cut", null="what the episode has left"
    ),
}


@dataclass(frozen=True)
class EnvironmentSettings(ABC):
    """The settings of one kind of environment.

    A new kind is one file with a frozen dataclass, and its line in `environments.kinds.KINDS`:

        @dataclass(frozen=True)
        class GuessSettings(EnvironmentSettings):
            kind = "guess"
            highest: int = 9

            def make(self) -> Environment:
                return Guess(self.highest)

            def rows(self) -> list[DataRow]:
                return [{"id": str(n), "number": n} for n in range(1, self.highest + 1)]
    """

    kind: ClassVar[str]  # as a run names it: kind, or {kind: ..., settings}
    max_turns: int | None = field(default=None, kw_only=True)
    turn_tokens: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        follow(LIMITS, self)

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """The settings that `kind:text` stands for; none where nothing may follow the colon."""
        return {}

    @abstractmethod
    def make(self) -> Environment:
        """The world of one episode."""

    def rows(self) -> list[DataRow] | None:
        """The tasks that the world makes of its own; None: they are read from the data."""
        return None

    @property
    def makes_rows(self) -> bool:
        """Whether it has tasks of its own."""
        return type(self).rows is not EnvironmentSettings.rows

    def check(self) -> None:
        """Refuses a machine that lacks what the world needs, before any model is loaded."""
        return
