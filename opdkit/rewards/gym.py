"""The reward `reasoning_gym`: the task's own scorer, from 0 to 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from opdkit.base.errors import UserError
from opdkit.rewards.extract import after_thinking, boxed, stated, tagged
from opdkit.rewards.guard import Failed, Guard, Guarded
from opdkit.types import Rollout

# characters of an answer; the largest grids of the library's tasks are a tenth of this
LONGEST = 20_000


@dataclass(frozen=True)
class ReasoningGym(Guarded):
    """The scorer's value for the answer in <answer>, \\boxed, "answer: ..." or, without these, the
    whole response.

    Scorers run in a confined process, and may evaluate arithmetic only: see docs/rewards.md. Many
    pay for an answer of the right form, or for being near: up to 0.95 for one that is the same for
    every question. So what is below `correct_from` gets 0.0; partial: what the scorer gives.
    """

    partial: bool = False
    correct_from: float = 0.99  # scorers give 1.0 for a right answer, some up to rounding
    unprotected: bool = False  # score also on a machine that cannot confine the scorers

    @property
    def guard(self) -> Guard:
        return Guard("gym", "reasoning_gym", "ReasoningGym", self.unprotected)

    def __call__(self, rollout: Rollout) -> float:
        task, config, entry = _entry(rollout)
        said = answer_in(rollout.text)
        if said is None or len(said) > LONGEST:
            return 0.0
        value = self.guard(task, config, entry, said)
        if not isinstance(value, Failed):
            # a scorer that calculates with what a model wrote may come to NaN
            good = math.isfinite(value) and (self.partial or value >= self.correct_from)
            return float(value) if good else 0.0
        # A scorer that fails on what a model wrote says that it is wrong; one that fails on its own
        # answer has a broken row.
        own = (
            None
            if entry["answer"] is None
            else self.guard(task, config, entry, str(entry["answer"]))
        )
        if isinstance(own, Failed):
            raise UserError(
                f"reasoning-gym's scorer of {task!r} cannot read the row: {own.why}. Generate the "
                "row anew with load_rows"
            )
        return 0.0


def _entry(rollout: Rollout) -> tuple[str, dict[str, Any], dict[str, Any]]:
    row = rollout.row
    if "reasoning_gym" in row:
        kept = row["reasoning_gym"]
        return kept["task"], kept["config"], kept["entry"]
    # a file of the library's own entries
    if isinstance(row.get("metadata"), dict) and "source_dataset" in row["metadata"]:
        return (
            row["metadata"]["source_dataset"],
            {},
            {key: row.get(key) for key in ("question", "answer", "metadata")},
        )
    raise UserError(
        "the reward reasoning_gym reads the task's entry, which the row does not have (columns: "
        f"{', '.join(row)}): use data such as reasoning_gym:chain_sum, or another reward"
    )


def answer_in(text: str) -> str | None:
    """What a response says its answer is; None where it says nothing.

    Only <answer></answer> says that the answer is empty.
    """
    text = after_thinking(text)
    said = tagged(text)
    if said is not None:
        return said
    return (boxed(text) or stated(text) or text).strip() or None
