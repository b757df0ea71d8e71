"""The reward `exact`: the whole response is the answer."""

from __future__ import annotations

from dataclasses import dataclass

from opdkit.rewards.extract import truth, truth_of
from opdkit.types import DataRow, Rollout


@dataclass(frozen=True)
class Exact:
    """1.0 where the response equals row["answer"], white space around both aside."""

    def check_row(self, row: DataRow) -> None:
        truth_of(row, "exact")

    def __call__(self, rollout: Rollout) -> float:
        return float(rollout.text.strip() == truth(rollout, "exact").strip())
