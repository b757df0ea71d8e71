"""Guided rollouts: the student continues the beginning of a reference response, ever shorter over
the run (TrOPD).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from opdkit.base.rules import Rules, at_least, follow
from opdkit.curricula.base import Plain
from opdkit.curricula.writer import Memory, StepContext, Writer
from opdkit.types import Prompt, Rollout, Sampling

PREFIX: Rules = {"extra": at_least(1, "it is the number of guided rollouts of each prompt")}


@dataclass(frozen=True)
class GuidedWriter(Writer):
    """The student: plain rollouts, then `extra` guided ones for each prompt that has a reference
    response.
    """

    extra: int
    own: ClassVar[bool] = True

    def sampled(self, sampling: Sampling) -> float:
        return self.rollouts(sampling)

    def rollouts(self, sampling: Sampling) -> int:
        return sampling.num_generations + self.extra

    def write(self, context: StepContext) -> list[Rollout]:
        rollouts = context.sample(context.prompts, context.sampling)
        if guided := self.guided(context):
            settings = replace(context.sampling, num_generations=self.extra)
            rollouts = rollouts + context.sample(guided, settings)
        return rollouts

    def guided(self, context: StepContext) -> list[Prompt]:
        """The prompts that have a reference response, with its beginning."""
        share = prefix_share(context.step, context.total_steps)
        made = []
        for prompt in context.prompts:
            response = context.reference(prompt) or []
            length = min(math.floor(share * len(response)), context.sampling.max_completion_length)
            if length > 0:
                made.append(replace(prompt, id=f"{prompt.id}:guided", prefix=response[:length]))
        return made


@dataclass(frozen=True)
class TeacherPrefix(Plain):
    """Besides the plain rollouts, `extra` guided ones for each prompt whose data row has a
    reference response.

    At step n of N a guided rollout starts with the first floor(alpha L) of the response's L tokens,
    alpha = (1 + cos(pi n / N)) / 2: all of it at the first step, none at the last. Those tokens are
    marked "guided". arXiv 2606.01249.
    """

    kind: ClassVar[str] = "teacher_prefix"
    extra: int = 1

    def __post_init__(self) -> None:
        follow(PREFIX, self)

    @property
    def writer(self) -> Writer:
        return GuidedWriter(self.extra)

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        return {"prefix_share": prefix_share(step, total_steps)}


def prefix_share(step: int, total_steps: int) -> float:
    """(1 + cos(pi n / N)) / 2: 1 at n = 0, 0 at n = N."""
    return (1 + math.cos(math.pi * min(step / max(total_steps, 1), 1.0))) / 2
