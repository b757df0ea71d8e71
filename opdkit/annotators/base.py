"""What an annotator is: it adds to a step's rollouts what the teachers and the formula are to read
of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opdkit.types import Rollout


@dataclass(frozen=True)
class AnnotateContext:
    """What an annotator is told of a step."""

    step: int
    seed: int
    policy_version: int = 0  # optimiser steps that the student has taken
    memory: Mapping[str, Any] = field(default_factory=dict)  # the run's, to be read only


class Annotator(ABC):
    """Adds marks, columns of the row or feedback to the rollouts of a step, once they have their
    rewards. Its tokens, log-probs and rewards stay as they are.

    What it draws is keyed by seed and step: a resumed run calls it with the same context and gets
    the same. What it must remember it returns, as plain JSON, and finds again in `context.memory`.
    """

    @abstractmethod
    def annotate(
        self, rollouts: Sequence[Rollout], context: AnnotateContext
    ) -> tuple[list[Rollout], Mapping[str, Any]]:
        """The rollouts, in their order, and what is to be added to the run's memory."""
