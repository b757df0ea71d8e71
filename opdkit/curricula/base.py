"""The interface of a curriculum, and the plain ones: every prompt as it is, written by the student
or read from the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from opdkit.base.errors import UserError
from opdkit.objective.maths import keyed_uniform
from opdkit.types import Prompt, Rollout, Sampling

Memory = dict[str, Any]  # what a curriculum learns in a run: plain JSON, saved in checkpoints
# a prompt's reference response as token ids, where the data has one
Reference = Callable[[Prompt], "list[int] | None"]


@dataclass(frozen=True)
class Ask:
    """Prompts to be sampled with the same settings."""

    prompts: tuple[Prompt, ...]
    sampling: Sampling


class Curriculum(Protocol):
    """A frozen dataclass of settings: who writes a step's responses, to which prompts, and what is
    remembered of them.
    """

    # whether `validated` wants the loss on held-out reference responses at every evaluation
    validates: ClassVar[bool]

    def source(self, step: int, total_steps: int, seed: int, memory: Memory) -> str:
        """Who writes this step's responses: "student", "data", "replay" or "cache"; the same draw
        in a resumed run.
        """
        ...

    def plan(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        reference: Reference,
        step: int,
        total_steps: int,
        memory: Memory,
    ) -> list[Ask]:
        """What the student is asked."""
        ...

    def replay(self, count: int, step: int, seed: int, memory: Memory) -> list[Rollout]:
        """`count` earlier responses."""
        ...

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        """Memory after the step's rollouts have been scored."""
        ...

    def validated(self, loss: float, memory: Memory) -> Memory:
        """Memory after an evaluation."""
        ...


@dataclass(frozen=True)
class Plain:
    """Every prompt as it is, every response written by the student."""

    validates: ClassVar[bool] = False

    def source(self, step: int, total_steps: int, seed: int, memory: Memory) -> str:
        return "student"

    def plan(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        reference: Reference,
        step: int,
        total_steps: int,
        memory: Memory,
    ) -> list[Ask]:
        return [Ask(tuple(prompts), sampling)]

    def replay(self, count: int, step: int, seed: int, memory: Memory) -> list[Rollout]:
        raise UserError(f"{type(self).__name__} remembers no responses to replay")

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        return memory

    def validated(self, loss: float, memory: Memory) -> Memory:
        return memory


@dataclass(frozen=True)
class Mixed(Plain):
    """The student writes `student_share` of the batches; the responses of the others are read from
    the data (GKD's lambda).
    """

    student_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.student_share <= 1:
            raise ValueError(
                f"student_share={self.student_share} must lie in [0, 1]: the share of batches that "
                "the student writes"
            )

    def source(self, step: int, total_steps: int, seed: int, memory: Memory) -> str:
        return "student" if coin(step, seed) < self.student_share else "data"


def coin(step: int, seed: int) -> float:
    """The step's uniform draw in [0, 1) of who writes."""
    return keyed_uniform(
        seed, step, "who writes", torch.zeros(1, dtype=torch.int64), 1, torch.float64
    ).item()
