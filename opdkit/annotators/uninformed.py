"""Which rollouts a teacher's view has nothing to show for: they are marked, for methods that learn
nothing from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.annotators.base import AnnotateContext, Annotator
from opdkit.data.views import View
from opdkit.types import Rollout


@dataclass(frozen=True)
class Uninformed(Annotator):
    """Marks every token of a rollout for which one of the views has nothing to show."""

    views: tuple[View, ...]

    def annotate(
        self, rollouts: Sequence[Rollout], context: AnnotateContext
    ) -> tuple[list[Rollout], Mapping[str, Any]]:
        return [self.marked(rollout, rollouts) for rollout in rollouts], {}

    def marked(self, rollout: Rollout, among: Sequence[Rollout]) -> Rollout:
        """The rollout with its mark, which another annotator may have set already."""
        blind = any(view.pieces(rollout, among) is None for view in self.views)
        before = rollout.marks.get("uninformed", [False] * len(rollout.tokens))
        return replace(rollout, marks={**rollout.marks, "uninformed": [blind or b for b in before]})
