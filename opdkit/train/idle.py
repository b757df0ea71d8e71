"""Says so where steps pass and nothing is learnt."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

STEPS = 3  # in a row, before it is said
STILL = (
    "the gradient is zero, so the weights stay as they are. Either no token has a weight (see "
    "share/ and weight/ in metrics.jsonl), or student and teacher agree everywhere: is the teacher "
    "another model than the student?"
)
EQUAL = (
    "all responses have the same reward, and this method learns from differences. Take easier or "
    "harder problems, more num_generations, or look with samples/ at what the reward is given"
)
CUT = (
    "every response is cut at max_completion_length, so the student never sees an end. Raise "
    "max_completion_length, or see whether the model knows when to stop"
)


@dataclass
class Idle:
    """Counts steps in a row that can teach nothing; each kind is said once, on the screen.

    by_reward: whether the method reads rewards.
    """

    by_reward: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, metrics: Mapping[str, float]) -> list[str]:
        """What has now been so for `STEPS` steps in a row."""
        found = {
            STILL: metrics.get("grad_norm") == 0,
            EQUAL: self.by_reward and metrics.get("reward/std") == 0,
            # a curriculum that cuts them has its reasons
            CUT: metrics.get("completions/truncated_fraction") == 1
            and "curriculum/length" not in metrics,
        }
        said = []
        for words, so in found.items():
            self.counts[words] = self.counts.get(words, 0) + 1 if so else 0
            if self.counts[words] == STEPS:
                said.append(f"for {STEPS} steps in a row {words}")
        for text in said:
            print(f"opdkit: {text}", file=sys.stderr)
        return said
