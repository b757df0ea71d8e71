"""An opponent that plays: beside each response of the student stands one of another policy, against
which it is judged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from opdkit.curricula.base import Plain
from opdkit.curricula.student import StudentWriter
from opdkit.curricula.writer import StepContext, Writer
from opdkit.types import Rollout, Sampling


@dataclass(frozen=True)
class OpposedWriter(Writer):
    """The student's responses, each with another to the same prompt in its row's column `opponent`:
    at steps 0, 2, 4 ... written by the copy `model`, at the others by the student itself.
    """

    model: str
    own: ClassVar[bool] = True

    @property
    def players(self) -> tuple[str, ...]:
        return (self.model,)

    def sampled(self, sampling: Sampling) -> float:
        return 2 * sampling.num_generations

    def write(self, context: StepContext) -> list[Rollout]:
        own = StudentWriter().write(context)
        if context.step % 2 == 0:
            theirs = context.sample_as(self.model, context.prompts, context.sampling)
        else:
            theirs = context.sample(context.prompts, context.sampling)
        by = "student" if context.step % 2 else self.model
        return [
            replace(
                mine,
                row={
                    **mine.row,
                    "opponent": {
                        "by": by,
                        "text": other.text,
                        "tokens": other.tokens,
                        "finish": other.finish,
                    },
                },
            )
            for mine, other in zip(own, theirs, strict=True)
        ]


@dataclass(frozen=True)
class Opposed(Plain):
    """Beside each response of the student stands one of an opponent, whom the student does not
    learn from: the run's reward says how probably the student's is the better (see
    `rewards.against`). At even steps, from 0, the copy `model` plays, at odd ones the student.
    arXiv 2505.19731.
    """

    kind: ClassVar[str] = "opponent"
    model: str = "anchor"

    @property
    def writer(self) -> Writer:
        return OpposedWriter(self.model)
