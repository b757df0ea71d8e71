"""What a curriculum asks before the first step, and rollouts that were written earlier: how they
are remembered, and what a step has of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from opdkit.types import Rollout

Tick = Callable[[int], object]  # is told how many responses are written


@dataclass(frozen=True)
class Ask:
    """The student as it is before the first step, and what its answers are worth."""

    questions: Sequence[str]  # of all the run's prompts
    # responses to some of these prompts, by their numbers: so many to each, of which the first has
    # this number, with rewards
    sample: Callable[[Sequence[int], int, int, Tick], list[Rollout]]


@dataclass(frozen=True)
class Recalled:
    """Rollouts that a step has again, whole groups of them, with the rewards that they had."""

    # in the place of as many of the step's prompts as these have groups: filters see them too
    instead: Sequence[Rollout] = ()
    beside: Sequence[Rollout] = ()  # besides the step's prompts: no filter sees them

    def __add__(self, other: Recalled) -> Recalled:
        return Recalled([*self.instead, *other.instead], [*self.beside, *other.beside])


def kept(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain JSON; what goes without saying is left out."""
    values = asdict(replace(rollout, notes=None))
    usual = {f.name: f.default for f in fields(Rollout) if f.default is not MISSING}
    usual |= {"trained": [True] * len(rollout.tokens), "drawn_logp": rollout.logp, "turns": []}
    return {k: v for k, v in values.items() if k not in usual or v != usual[k]}


def again(values: dict[str, Any]) -> Rollout:
    """The rollout that was kept."""
    usual = {"trained": [True] * len(values["tokens"]), "drawn_logp": values["logp"]}
    return Rollout(**usual | values)
