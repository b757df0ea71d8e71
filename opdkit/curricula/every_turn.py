"""Every assistant turn of a reference trajectory as a question of its own (OPAD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from opdkit.curricula.base import Plain
from opdkit.curricula.writer import StepContext, Writer
from opdkit.types import Rollout


@dataclass(frozen=True)
class TurnWriter(Writer):
    """The student writes each turn of the step's trajectories, those of one side by side."""

    own: ClassVar[bool] = True
    asks_turns: ClassVar[bool] = True

    def write(self, context: StepContext) -> list[Rollout]:
        turns = [turn for prompt in context.prompts for turn in context.turns(prompt)]
        return context.sample(turns, context.sampling)


@dataclass(frozen=True)
class EveryTurn(Plain):
    """A trajectory with n assistant turns is n prompts: prompt j holds all messages before turn j,
    as the data has them, and the student writes that turn.

    A step has prompts_per_step trajectories; they are shuffled, their turns are not parted. The
    question is the trajectory, the group of responses that are compared the turn. A trajectory with
    one turn is asked as it is, and one without is left out of the data. arXiv 2605.01347.
    """

    kind: ClassVar[str] = "every_turn"

    @property
    def writer(self) -> Writer:
        return TurnWriter()
