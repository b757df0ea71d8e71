"""What every kind of annotator says of itself: its settings, and what it reads and writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from opdkit.annotators.base import Annotator
from opdkit.teachers.context import TeacherContext
from opdkit.types import Sampler


@dataclass(frozen=True)
class AnnotatorContext:
    """A run as its annotators see it when they are opened."""

    teachers: TeacherContext  # the student's tokenizer, and models that are open already
    student: Sampler  # the student as it is at each step, which can write text
    # how many tokens the student reads; None: no limit is known
    reads: int | None = None
    # the run's other models by name, in the words of a run's `teacher`
    models: Mapping[str, Any] = field(default_factory=dict)
    # the student as a `local.LocalModel`, where it is sampled in this process
    here: Any = None


class AnnotatorSettings(ABC):
    """The settings of one kind of annotator.

    A new kind is one file with a frozen dataclass, and its line in `annotators.kinds.KINDS`. Here
    one that marks tokens that the student found improbable, `annotate.rare={kind: rare, below:
    0.01}`:

        @dataclass(frozen=True)
        class RareSettings(AnnotatorSettings):
            kind = "rare"
            marks = ("rare",)
            below: float = 0.05

            def open(self, context: AnnotatorContext) -> Annotator:
                return Rare(math.log(self.below))

        @dataclass(frozen=True)
        class Rare(Annotator):
            least: float

            def annotate(self, rollouts, context):
                return [
                    replace(r, marks={**r.marks, "rare": [lp < self.least for lp in r.logp]})
                    for r in rollouts
                ], {}
    """

    kind: ClassVar[str]  # as a run names it: kind:..., or {kind: ..., settings}
    main: ClassVar[str | None] = None  # the setting that follows the colon of kind:...
    marks: ClassVar[tuple[str, ...]] = ()  # that it writes
    columns: ClassVar[tuple[str, ...]] = ()  # of a rollout's row that it writes
    reads_reward: ClassVar[bool] = False  # whether rollouts must have one

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that every row of the data must have."""
        return ()

    @property
    def writers(self) -> tuple[Any, ...]:
        """Who writes text for it (see `speaker.open_speaker`)."""
        return ()

    @property
    def code(self) -> tuple[str, ...]:
        """Addresses file.py:function of one's own code in its settings."""
        return ()

    @abstractmethod
    def open(self, context: AnnotatorContext) -> Annotator:
        """The annotator; models are loaded now."""
