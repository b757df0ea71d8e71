"""What a writer is told of a step that was made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkit.curricula import StepContext
from opdkit.types import Prompt, Rollout, Sampling


def by_student(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
    """Responses of one token, which names the number of the response."""
    return [
        Rollout(f"{p.id}/{i}", p.tokens, [*p.prefix, i], [True], [-1.0], [-1.0], p.id)
        for p in prompts
        for i in range(sampling.num_generations)
    ]


def context(prompts: Sequence[Prompt] = (), **changes: Any) -> StepContext:
    """The first of ten steps; every prompt has the reference response 5, 6, 7, 8."""
    settings: dict[str, Any] = {
        "sampling": Sampling(),
        "step": 0,
        "total_steps": 10,
        "seed": 0,
        "sample": by_student,
        "reference": lambda prompt: [5, 6, 7, 8],
    }
    return StepContext(prompts=tuple(prompts), **settings | changes)
