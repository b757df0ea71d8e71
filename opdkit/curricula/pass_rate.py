"""Pass rates: how often the student has lately solved each prompt, for methods that weigh prompts
by difficulty (PACED).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from opdkit.base.rules import Rules, at_least, follow
from opdkit.curricula.base import Plain
from opdkit.curricula.writer import Memory
from opdkit.types import Rollout

PASS_RATES: Rules = {
    "window": at_least(1, "it is how many of a prompt's last rollouts its pass rate is taken over")
}


@dataclass(frozen=True)
class PassRates(Plain):
    """Every prompt as it is; memory["pass_rate"][question] is the share of correct ones among its
    last `window` rollouts.

    All rollouts of a visit count, also where they are more than the window. Rollouts without a
    reward, and those of which a part was written for the student, are passed over.
    """

    window: int = 8
    needs_own: ClassVar[bool] = True

    def __post_init__(self) -> None:
        follow(PASS_RATES, self)

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        fresh: dict[str, list[bool]] = {}
        for rollout in (r for r in rollouts if r.unaided):
            if rollout.correct is not None:
                fresh.setdefault(rollout.question, []).append(rollout.correct)
            elif rollout.reward is not None:
                fresh.setdefault(rollout.question, []).append(rollout.reward > 0)
        solved, rates = dict(memory.get("solved", {})), dict(memory.get("pass_rate", {}))
        for question, results in fresh.items():
            last = [*solved.get(question, []), *results][-max(self.window, len(results)) :]
            solved[question], rates[question] = last, sum(last) / len(last)
        return {**memory, "solved": solved, "pass_rate": rates}
