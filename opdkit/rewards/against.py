"""What a response is worth against another to the same prompt: how probably it is the better one.

A judge of two is a function of (row, a, b), `file.py:function`, that returns this for the answers
a and b, in [0, 1]. Any other reward judges by itself: the higher one wins, equal ones by half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from opdkit.base.errors import UserError
from opdkit.rewards.jail.feedback import split
from opdkit.rewards.own import OPPONENT, takes_two, two_of
from opdkit.rewards.score import Reward, score
from opdkit.types import Rollout


def compares(reward: Reward) -> bool:
    """Whether a reward is a judge of two answers."""
    known = getattr(reward, "pairwise", None)
    if known is not None or hasattr(reward, "score_many"):
        return bool(known)
    return takes_two(reward)


@dataclass(frozen=True)
class Beats:
    """P(a response beats the one in its row's column `opponent`), from a judge of two or from the
    rewards of both. A response is right where that is above 1/2.
    """

    reward: Reward
    correct_from: ClassVar[float] = math.nextafter(0.5, 1.0)

    @property
    def __name__(self) -> str:
        return str(getattr(self.reward, "__name__", type(self.reward).__name__))

    def score_many(self, rollouts: Sequence[Rollout]) -> list[Any]:
        if compares(self.reward):
            return self._judged(rollouts)
        mine, theirs = (
            score(list(each), self.reward) for each in (rollouts, map(beside, rollouts))
        )
        return [(_higher(a.reward, b.reward), a.feedback) for a, b in zip(mine, theirs)]

    def _judged(self, rollouts: Sequence[Rollout]) -> list[Any]:
        if hasattr(self.reward, "score_many"):
            values = list(self.reward.score_many(rollouts))
        else:
            judge: Any = self.reward
            values = [judge(*two_of(r)) for r in rollouts]
        for rollout, value in zip(rollouts, values):
            said = split(value)[0]
            if isinstance(said, (int, float)) and not 0 <= said <= 1:
                raise UserError(
                    f"the judge {self.__name__} returned {said} for rollout {rollout.id!r}: it is "
                    "to say how probably answer a is better than b, a number in [0, 1], and 0.5 "
                    "where neither is"
                )
        return values


def opposed(reward: Reward | None, plays: bool) -> Any:
    """A run's reward: where an opponent plays, by comparison with its responses."""
    return Beats(reward) if plays and reward is not None else reward


def _higher(mine: float | None, theirs: float | None) -> float:
    assert mine is not None and theirs is not None  # `score` gives each a number
    return 0.5 if mine == theirs else float(mine > theirs)


def beside(rollout: Rollout) -> Rollout:
    """The response with which one is compared, as a rollout."""
    other = rollout.row[OPPONENT]
    return replace(
        rollout,
        id=f"{rollout.id}/{OPPONENT}",
        tokens=other["tokens"],
        trained=[False] * len(other["tokens"]),
        logp=[],
        drawn_logp=[],
        text=other["text"],
        finish=other["finish"],
        marks={},
        notes=None,
        turns=[],
        feedback="",
    )
