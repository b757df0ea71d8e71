"""Stored rollouts: every response is read from a cache, none is written during training (Lightning
OPD).
"""

from __future__ import annotations

from dataclasses import dataclass

from opdkit.curricula.base import Curriculum, Memory, Plain


@dataclass(frozen=True)
class Cached(Plain):
    """The prompts of a step as they come, each with all its stored responses. arXiv 2604.13010."""

    def source(self, step: int, total_steps: int, seed: int, memory: Memory) -> str:
        return "cache"


def reads_cache(curriculum: Curriculum) -> bool:
    """Whether a curriculum takes its responses from a cache: then all of them."""
    return curriculum.source(0, 1, 0, {}) == "cache"
