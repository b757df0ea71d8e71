"""What collecting rollouts asks of a run: who writes, the questions, what was written earlier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from opdkit.types import Prompt, Rollout, Sampling


class Sampler(Protocol):
    """Who writes the responses."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        policy_version: int,
    ) -> list[Rollout]: ...

    def sync(self, model: Any, version: int) -> None:
        """Take over the student's weights after an optimiser step."""
        ...


class Questions(Protocol):
    """The prompts of a data set (see `data.Prompts`)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Prompt: ...
    def response_tokens(self, index: int) -> list[int] | None: ...


class Stored(Protocol):
    """Rollouts written earlier (see `data.cache.Cache`)."""

    def rollouts(self, prompt: Prompt) -> list[Rollout]: ...
