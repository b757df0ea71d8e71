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

    kind: ClassVar[str] = "pass_rate"
    window: int = 8
    needs_own: ClassVar[bool] = True

    def __post_init__(self) -> None:
        follow(PASS_RATES, self)

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        solved, rates = dict(memory.get("solved", {})), dict(memory.get("pass_rate", {}))
        for question, results in outcomes(rollouts).items():
            last = [*solved.get(question, []), *results][-max(self.window, len(results)) :]
            solved[question], rates[question] = last, sum(last) / len(last)
        return {**memory, "solved": solved, "pass_rate": rates}

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        """The mean over prompts, and the shares of them that are always and never solved."""
        rates = list(memory.get("pass_rate", {}).values())
        if not rates:
            return {}
        return {
            "mean_pass_rate": sum(rates) / len(rates),
            "always_solved": rates.count(1.0) / len(rates),
            "never_solved": rates.count(0.0) / len(rates),
        }


def outcomes(rollouts: Sequence[Rollout]) -> dict[str, list[bool]]:
    """Which of the student's own responses to each question are right; those without a reward tell
    nothing.
    """
    found: dict[str, list[bool]] = {}
    for rollout in (r for r in rollouts if r.unaided):
        if rollout.correct is not None:
            found.setdefault(rollout.question, []).append(rollout.correct)
        elif rollout.reward is not None:
            found.setdefault(rollout.question, []).append(rollout.reward > 0)
    return found
