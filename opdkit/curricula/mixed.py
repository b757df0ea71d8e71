"""Batches of the student and batches of the data by turns, as a coin falls (GKD's lambda)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from opdkit.curricula.base import Plain
from opdkit.curricula.data import DataWriter
from opdkit.curricula.student import StudentWriter
from opdkit.curricula.writer import StepContext, Writer
from opdkit.types import Rollout, Sampling


@dataclass(frozen=True)
class MixedWriter(Writer):
    """The student with probability `student_share`, else the data: one of them per step."""

    student_share: float

    @property
    def reads_data(self) -> bool:
        return self.student_share < 1

    @property
    def draws(self) -> bool:
        return self.student_share > 0

    def sampled(self, sampling: Sampling) -> float:
        return self.student_share * sampling.num_generations

    def rollouts(self, sampling: Sampling) -> int:
        return sampling.num_generations if self.student_share else 1

    def choose(self, coin: float) -> Writer:
        """Who writes the step for a draw in [0, 1)."""
        return StudentWriter() if coin < self.student_share else DataWriter()

    def write(self, context: StepContext) -> list[Rollout]:
        return self.choose(context.coin).write(context)


@dataclass(frozen=True)
class Mixed(Plain):
    """The student writes `student_share` of the batches; the responses of the others are read from
    the data (GKD's lambda).
    """

    kind: ClassVar[str] = "mixed"
    student_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.student_share <= 1:
            raise ValueError(
                f"student_share={self.student_share} must lie in [0, 1]: the share of batches that "
                "the student writes"
            )

    @property
    def authors(self) -> tuple[str, ...]:
        return ("student",) if self.student_share == 1 else ("student", "data")

    @property
    def writer(self) -> Writer | None:
        return None if self.student_share == 1 else MixedWriter(self.student_share)
