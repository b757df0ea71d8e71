"""The reward `exact`: the whole response is the answer."""

from __future__ import annotations

from dataclasses import dataclass

from opdkit.rewards.extract import after_thinking, truth, truth_of
from opdkit.types import DataRow, Rollout


@dataclass(frozen=True)
class Exact:
    """1.0 where the response equals row["answer"], white space and thoughts aside."""

    confined = False

    def check_row(self, row: DataRow) -> None:
        truth_of(row, "exact")

    def __call__(self, rollout: Rollout) -> float:
        return float(after_thinking(rollout.text) == truth(rollout, "exact").strip())
