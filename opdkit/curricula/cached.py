"""Stored rollouts: every response is read from a cache, none is written during training (Lightning
OPD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from opdkit.curricula.base import Curriculum, Plain, writer_of
from opdkit.curricula.writer import StepContext, Writer
from opdkit.types import Rollout, Sampling


@dataclass(frozen=True)
class CacheWriter(Writer):
    """Each prompt's stored responses, all of them, as they were written."""

    stored: ClassVar[bool] = True
    cuts: ClassVar[bool] = False

    def sampled(self, sampling: Sampling) -> float:
        return 0

    def write(self, context: StepContext) -> list[Rollout]:
        return [rollout for prompt in context.once for rollout in context.stored(prompt)]


@dataclass(frozen=True)
class Cached(Plain):
    """The prompts of a step as they come, each with all its stored responses. arXiv 2604.13010."""

    @property
    def writer(self) -> Writer:
        return CacheWriter()


def reads_cache(curriculum: Curriculum) -> bool:
    """Whether a curriculum takes its responses from a cache: then all of them."""
    return writer_of(curriculum).stored
