"""Environments of a person's own file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opdkit.base.address import load_address, path_of
from opdkit.base.errors import UserError, shown
from opdkit.base.own_code import CALL_SECONDS, own_code
from opdkit.environments.base import Environment
from opdkit.environments.settings import EnvironmentSettings
from opdkit.types import DataRow

PARTS = ("reset", "step", "done", "score")


@dataclass(frozen=True)
class OwnEnvironment(EnvironmentSettings):
    """The class that `file.py:Class` names, made anew for each episode with these arguments. Where
    it has a function `rows()`, of the class, these are its tasks.
    """

    kind = "own"
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        return {"name": text}

    def check(self) -> None:
        made = self._class()
        if lacking := [part for part in PARTS if not hasattr(made, part)]:
            raise UserError(
                f"environment {self.name!r} has no {lacking[0]!r}: an environment is a class with "
                f"{', '.join(PARTS)} (see opdkit.environments.Environment)"
            )
        self.make()

    def make(self) -> Environment:
        with own_code(f"environment {self.name!r} cannot be made", self.path, CALL_SECONDS):
            made = self._class()(**self.arguments)
        # of a class that is no subclass
        for part, before in (("tools", ()), ("thoughts", False), ("close", _nothing)):
            if not hasattr(made, part):
                setattr(made, part, before)
        return made

    def rows(self) -> list[DataRow] | None:
        rows = getattr(self._class(), "rows", None)
        if rows is None:
            return None
        with own_code(f"environment {self.name!r} gives no tasks", self.path, CALL_SECONDS):
            return [dict(row) for row in rows()]

    @property
    def makes_rows(self) -> bool:
        return hasattr(self._class(), "rows")

    @property
    def path(self) -> str:
        return path_of(self.name)

    def _class(self) -> Any:
        found = load_address(self.name)
        if not callable(found):
            raise UserError(
                f"environment {self.name!r} is {shown(found)}, not a class: name one with "
                f"{', '.join(PARTS)}"
            )
        return found


def _nothing() -> None:
    """There is nothing to close."""
