"""The interface of a curriculum, and the one that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from opdkit.types import Prompt, Rollout, Sampling

Reference = Callable[[Prompt], "list[int] | None"]  # a prompt's reference response as token ids, where the data has one


@dataclass(frozen=True)
class Ask:
    """Prompts to be sampled with the same settings."""

    prompts: tuple[Prompt, ...]
    sampling: Sampling


class Curriculum(Protocol):
    """A frozen dataclass of settings. What it learns from run to run lives in a plain dict that checkpoints save."""

    def plan(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        reference: Reference,
        step: int,
        total_steps: int,
        memory: dict[str, Any],
    ) -> list[Ask]:
        """What to sample at this step."""
        ...

    def observe(self, rollouts: Sequence[Rollout], memory: dict[str, Any]) -> dict[str, Any]:
        """Memory after the step's rollouts have been scored."""
        ...


@dataclass(frozen=True)
class Plain:
    """Every prompt as it is."""

    def plan(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        reference: Reference,
        step: int,
        total_steps: int,
        memory: dict[str, Any],
    ) -> list[Ask]:
        return [Ask(tuple(prompts), sampling)]

    def observe(self, rollouts: Sequence[Rollout], memory: dict[str, Any]) -> dict[str, Any]:
        return memory
