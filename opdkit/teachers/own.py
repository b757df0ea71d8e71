"""The student as its own teacher: with the weights that it began with, an average of those that it
had, or those that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from opdkit.models.body import head_of
from opdkit.models.held import HERE, Held
from opdkit.models.identity import Identity
from opdkit.models.shapes import Shape
from opdkit.objective.companion import Companion
from opdkit.objective.copies import Ema
from opdkit.objective.facts import Fact
from opdkit.teachers.base import Scorer
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.local import LocalModel
from opdkit.teachers.teacher import Teacher

WEIGHTS = ("fixed", "ema", "sync", "live")
STUDENT = "the student"  # its name where a plan asks for a model's shape


@dataclass(frozen=True)
class SelfTeacher(Teacher):
    """The student itself, as a rule behind a view: `{kind: self, weights: ema, view: solution}`.

    Arguments:
        weights: "fixed", those that it began with (with adapters: those below them, no second
            copy); "ema", a moving average; "sync", a copy made anew after every `every` optimiser
            steps; "live", those that it has at the start of each step.
        rate: of "ema": the share of the way that the average moves to the student.
        every: of "ema" and "sync": optimiser steps between two moves.
        first_copy: of "ema": whether the first move goes all the way.
    """

    kind = "self"
    main = "weights"
    alone = True
    weights: str = "fixed"
    rate: float | None = None
    every: int | None = None
    first_copy: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights={self.weights!r} must be one of {', '.join(WEIGHTS)}")
        moves = {
            "rate": (self.rate is not None, ("ema",)),
            "every": (self.every is not None, ("ema", "sync")),
            "first_copy": (self.first_copy, ("ema",)),
        }
        for name, (given, of) in moves.items():
            if given and self.weights not in of:
                raise ValueError(
                    f"{name} says how a copy of the student follows it, and weights={self.weights} "
                    f"has none: leave it out, or set weights to {' or '.join(of)}"
                )
        self.companions("teacher")  # what they cannot be is an error now

    @property
    def adds_up(self) -> bool:
        return True

    @property
    def starts_student(self) -> bool:
        return self.weights == "fixed"

    def companions(self, model: str) -> Iterable[Companion]:
        """The copy that follows the student, by the name under which the objective reads it."""
        if self.weights == "ema":
            rate = 0.01 if self.rate is None else self.rate
            return (Ema(rate, self.every or 1, model, self.first_copy),)
        if self.weights == "sync":
            return (Ema(1.0, 10 if self.every is None else self.every, model),)
        return ()

    def says(self, fact: Fact, model: str) -> bool:
        return True

    def open(self, context: TeacherContext) -> Scorer:
        if self.weights == "fixed":
            return context.once("the student's initial weights", context.start)
        if self.weights == "live":
            return self._scorer(context.student, context)
        (copy,) = self.companions(context.role + context.member)
        return self._scorer(context.beside[copy].model, context)

    def _scorer(self, model: Any, context: TeacherContext) -> LocalModel:
        return LocalModel(model, head_of(model), context.micro_batch_tokens)

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        """Weights of its own only where they are fixed; copies are counted with what stands beside
        the student.
        """
        own = self.weights == "fixed"
        return [Held(role, STUDENT, HERE, shape_of(STUDENT), dtype, own=own)]

    def identity(self) -> Identity:
        moves = "".join(f", {copy}" for copy in self.companions("teacher"))
        return Identity(f"{STUDENT}, weights {self.weights}{moves}")
