"""The teacher of a run that names none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from opdkit.base.errors import UserError
from opdkit.models.held import Held
from opdkit.models.identity import Identity
from opdkit.models.shapes import Shape
from opdkit.objective.facts import Fact
from opdkit.objective.needs import Needs
from opdkit.teachers.base import Remote, Scorer
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.teacher import Teacher


@dataclass(frozen=True)
class NoTeacher(Teacher):
    """Nothing can be read of it; a method that reads no teacher does not mind."""

    kind = "none"

    def says(self, fact: Fact, model: str) -> bool:
        return False

    def refuse(self, method: str, needs: Needs, model: str = "teacher") -> None:
        if model in needs.models:
            raise UserError(
                f"method {method!r} learns from a model {model!r}, and the run names none: say "
                "which with teacher=MODEL (a folder, a hub name, server:URL), or let the student "
                "teach itself (teacher=self teacher.view=solution)"
            )

    def open(self, context: TeacherContext) -> Scorer | Remote:
        raise UserError("the run names no teacher: set teacher=MODEL")

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        return []

    def identity(self) -> Identity:
        return Identity("none")
