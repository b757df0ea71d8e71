"""Responses that the student writes now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from opdkit.curricula.writer import StepContext, Writer
from opdkit.types import Rollout, Sampling


@dataclass(frozen=True)
class StudentWriter(Writer):
    """The student writes `num_generations` responses to each prompt, as it is; `usual` of them
    where the run leaves that at 1.
    """

    usual: int = 1
    own: ClassVar[bool] = True

    def per_prompt(self, sampling: Sampling) -> int:
        return sampling.num_generations if sampling.num_generations > 1 else self.usual

    def sampled(self, sampling: Sampling) -> float:
        return self.per_prompt(sampling)

    def rollouts(self, sampling: Sampling) -> int:
        return self.per_prompt(sampling)

    def write(self, context: StepContext) -> list[Rollout]:
        count = self.per_prompt(context.sampling)
        return context.sample(context.prompts, replace(context.sampling, num_generations=count))
