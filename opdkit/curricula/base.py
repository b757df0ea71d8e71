"""The interface of a curriculum, and the plain one: every prompt as it is, every response written
by the student, nothing remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from opdkit.curricula.student import StudentWriter
from opdkit.curricula.writer import Memory, Writer
from opdkit.types import Rollout


class Curriculum(Protocol):
    """A frozen dataclass of settings: who writes a step's responses, and what is remembered of
    them.
    """

    # whether `observe` must see nothing but the student's own responses of the step
    needs_own: ClassVar[bool]

    @property
    def authors(self) -> tuple[str, ...]:
        """Who writes tokens that its method learns from (see `types.AUTHORS`)."""
        ...

    @property
    def validates(self) -> bool:
        """Whether `validated` wants the loss on held-out reference responses at every evaluation; a
        run without evaluations between its ends is then refused.
        """
        ...

    @property
    def writer(self) -> Writer | None:
        """Who writes; None: a curriculum that only remembers leaves it to the student."""
        ...

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        """Memory after the step's rollouts have been scored."""
        ...

    def validated(self, loss: float, memory: Memory) -> Memory:
        """Memory after an evaluation."""
        ...


@dataclass(frozen=True)
class Plain:
    """Every prompt as it is, every response written by the student, nothing remembered."""

    needs_own: ClassVar[bool] = False

    @property
    def authors(self) -> tuple[str, ...]:
        return ("student",)

    @property
    def validates(self) -> bool:
        return False

    @property
    def writer(self) -> Writer | None:
        return None

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        return memory

    def validated(self, loss: float, memory: Memory) -> Memory:
        return memory


def writer_of(curriculum: Curriculum) -> Writer:
    """Who writes under a curriculum: its writer, else the student."""
    return curriculum.writer or StudentWriter()
