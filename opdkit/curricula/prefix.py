"""Guided rollouts: the student continues the beginning of a reference response, ever shorter over
the run (TrOPD).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opdkit.curricula.base import Ask, Memory, Plain, Reference
from opdkit.types import Prompt, Sampling


@dataclass(frozen=True)
class TeacherPrefix(Plain):
    """Besides the plain rollouts, `extra` guided ones for each prompt whose data row has a
    reference response.

    At step n of N a guided rollout starts with the first floor(alpha L) of the response's L tokens,
    alpha = (1 + cos(pi n / N)) / 2: all of it at the first step, none at the last. Those tokens are
    marked "guided". arXiv 2606.01249.
    """

    extra: int = 1

    def plan(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        reference: Reference,
        step: int,
        total_steps: int,
        memory: Memory,
    ) -> list[Ask]:
        asks = super().plan(prompts, sampling, reference, step, total_steps, memory)
        alpha = prefix_share(step, total_steps)
        guided = []
        for prompt in prompts:
            length = math.floor(alpha * len(reference(prompt) or ()))
            if length > 0:
                prefix = (reference(prompt) or [])[: min(length, sampling.max_completion_length)]
                guided.append(replace(prompt, id=f"{prompt.id}:guided", prefix=list(prefix)))
        return (
            [*asks, Ask(tuple(guided), replace(sampling, num_generations=self.extra))]
            if guided
            else asks
        )


def prefix_share(step: int, total_steps: int) -> float:
    """(1 + cos(pi n / N)) / 2: 1 at n = 0, 0 at n = N."""
    return (1 + math.cos(math.pi * min(step / max(total_steps, 1), 1.0))) / 2
