"""Whoever wrote a rollout, as it said then: the log-probs that rollouts carry, for which no model
is loaded and no pass is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.models.held import Held
from opdkit.models.identity import Identity
from opdkit.models.layout import Layout
from opdkit.models.shapes import Shape
from opdkit.objective.facts import Fact, LogpFact, TopFact
from opdkit.objective.supply import Tensors
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.teacher import Teacher


@dataclass(frozen=True)
class RecordedScorer:
    """Answers with the log-probs of rollouts that carry `mark`. Of others it does not know what
    that policy would have said: minus infinity there, which no loss takes for a number.
    """

    mark: str

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] at flat positions [N]."""
        width = layout.width
        table = torch.full((len(layout.rollouts), width), -math.inf, dtype=torch.float64)
        for row, r in zip(table, layout.rollouts):
            if any(r.marks.get(self.mark, ())):
                row[: len(r.logp)] = torch.tensor(r.logp, dtype=row.dtype)
        known = table.flatten()[positions.cpu()].to(positions.device)
        return dict.fromkeys(wanted, known)


@dataclass(frozen=True)
class RecordedTeacher(Teacher):
    """The policy that wrote the rollouts with a mark: `recorded:rehearsal`.

    A run that names a model in its place has that one's log-probs instead, at every step.
    """

    kind = "recorded"
    main = "mark"
    mark: str

    def says(self, fact: Fact, model: str) -> bool:
        return fact == LogpFact(model)

    def open(self, context: TeacherContext) -> RecordedScorer:
        return RecordedScorer(self.mark)

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        return []

    def identity(self) -> Identity:
        return Identity(f"who wrote the rollouts marked {self.mark!r}")
