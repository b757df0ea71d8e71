"""Several responses to each prompt without being asked for: a method whose paper has so many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from opdkit.base.rules import Rules, at_least, follow
from opdkit.curricula.base import Plain
from opdkit.curricula.student import StudentWriter
from opdkit.curricula.writer import Writer

SEVERAL: Rules = {
    "responses": at_least(1, "it is how many responses of the student each prompt has")
}


@dataclass(frozen=True)
class Several(Plain):
    """Every prompt as it is, with so many responses of the student; a run that sets num_generations
    has its own number.
    """

    kind: ClassVar[str] = "several"
    responses: int = 1

    def __post_init__(self) -> None:
        follow(SEVERAL, self)

    @property
    def writer(self) -> Writer:
        return StudentWriter(self.responses)
