"""The reward `exact`: the whole response is the answer."""

from __future__ import annotations

from dataclasses import dataclass

from opdkit.rewards.extract import after_thinking, truth
from opdkit.types import Rollout


@dataclass(frozen=True)
class Exact:
    """1.0 where the response equals row["answer"], white space and thoughts aside."""

    confined = False

    def __call__(self, rollout: Rollout) -> float:
        return float(after_thinking(rollout.text) == truth(rollout, "exact").strip())
