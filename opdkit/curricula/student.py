"""Responses that the student writes now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from opdkit.curricula.writer import StepContext, Writer
from opdkit.types import Rollout


@dataclass(frozen=True)
class StudentWriter(Writer):
    """The student writes `num_generations` responses to each prompt, as it is."""

    own: ClassVar[bool] = True

    def write(self, context: StepContext) -> list[Rollout]:
        return context.sample(context.prompts, context.sampling)
