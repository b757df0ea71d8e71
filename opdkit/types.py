"""What flows through a run: prompts, sampling settings, rollouts.

Log-probabilities and entropies are in nats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

DataRow = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One question as token ids, with the data row it came from."""

    id: str
    tokens: list[int]
    row: DataRow = field(default_factory=dict)
    # response tokens written for the student (a teacher prefix)
    prefix: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Names as in transformers and TRL."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    max_completion_length: int = 512
    num_generations: int = 1  # responses per prompt
    stop: tuple[str, ...] = ()  # stop strings, besides the end-of-sequence tokens

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's own softmax, nothing scaled or cut."""
        return (
            self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0
        )


@dataclass(frozen=True)
class Rollout:
    """One response and its provenance, before tensors: crosses process borders, caches and logs."""

    id: str  # unique in the run, stable over resume, order and sharding: it keys the random signals
    prompt: list[int]
    tokens: list[int]  # the response, with its end-of-sequence token if it wrote one
    trained: list[bool]  # False: tool output, user turns, anything the student did not choose
    # log-prob of each token under the sampler's plain softmax (temperature 1, nothing cut)
    logp: list[float]
    # under the distribution it was drawn from (temperature, top_p, top_k, min_p)
    drawn_logp: list[float]
    group: str  # the prompt: rollouts of one group answer the same question
    policy_version: int = 0  # optimiser steps the sampling policy had taken
    # "stop": it ended itself; "length": cut at max_completion_length; "given": read from data
    finish: str = "stop"
    text: str = ""
    reward: float | None = None
    correct: bool | None = None
    # named sets of tokens, such as "guided"
    marks: dict[str, list[bool]] = field(default_factory=dict)
    row: DataRow = field(default_factory=dict)
    # what else the sampler saw at each token
    notes: Notes | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Notes:
    """What a sampler saw of its own distribution at each token of a rollout, where it was asked to
    look: see `Watch`.
    """

    entropy: Tensor | None  # [T] nats
    top: Tensor | None  # [T, k] int64: ids of the most probable tokens, most probable first
    top_logp: Tensor | None  # [T, k]: their log-probs


@dataclass(frozen=True)
class Watch:
    """What a sampler is to note at each token, under the plain softmax: no pass of the student has
    to find it out again.
    """

    entropy: bool = False
    top: int = 0  # how many of the most probable tokens, with their log-probs


class Sampler(Protocol):
    """What lets the student write its responses."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int | None,
        policy_version: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> list[Rollout]:
        """`sampling.num_generations` responses to each prompt, those to one prompt side by side.

        Arguments:
            seed: draws are keyed by it and by each rollout's id.
            step: part of the rollouts' ids, step/prompt/number; None: they have none.
            policy_version: optimiser steps that the student has taken.
            progress: is called with the number of rollouts finished so far.
        """
        ...

    def sync(self, model: Any, version: int) -> None:
        """Take over the student's weights after an optimiser step, the `version`-th."""
        ...


# -------------------------------------------------------------------------------------------- facts


def row_keys(ids: Iterable[str], device: torch.device | str = "cpu") -> Tensor:
    """[B] int64: a hash of each rollout's id, the same on every machine."""
    digests = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids]
    return torch.tensor(
        [int.from_bytes(d, "little", signed=True) for d in digests],
        dtype=torch.int64,
        device=device,
    )
