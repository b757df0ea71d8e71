"""What collecting rollouts asks of a run: who writes, the questions, what was written earlier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from opdkit.annotators import Annotator
from opdkit.curricula import Writer
from opdkit.curricula.writer import nothing_viewed
from opdkit.rewards import Reward
from opdkit.train.collect.filters import Filter
from opdkit.types import Prompt, Rollout, Sampler, Sampling


class Questions(Protocol):
    """The prompts of a data set (see `data.Prompts`)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Prompt: ...
    def response_tokens(self, index: int) -> list[int] | None: ...


class Stored(Protocol):
    """Rollouts written earlier (see `data.cache.Cache`)."""

    def rollouts(self, prompt: Prompt) -> list[Rollout]: ...


@dataclass
class Collector:
    """What is asked at each step, who answers, what an answer is worth, and what becomes of it."""

    writer: Writer
    sampler: Sampler
    prompts: Questions
    stream: Any  # data.PromptStream: which of the prompts come next
    sampling: Sampling
    prompts_per_step: int
    seed: int = 0
    reward: Reward | None = None
    filters: tuple[Filter, ...] = ()  # one after the other, once rollouts have their rewards
    annotators: tuple[Annotator, ...] = ()  # one after the other, on what the filters left
    stored: Stored | None = None  # where the writer reads its rollouts from a cache
    # a prompt as a view of its row writes it
    viewed: Callable[[Prompt, str], Prompt] = nothing_viewed
