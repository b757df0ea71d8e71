"""How rewards with names have gone: means over the last steps, for methods that go by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opdkit.curricula.base import Plain
from opdkit.curricula.writer import Memory
from opdkit.types import Rollout, reward_means


@dataclass(frozen=True)
class RewardMeans(Plain):
    """Every prompt as it is; memory["reward_means"][name] has the mean of that reward in each of
    the last 2 `window` steps in which it applied to a rollout, filters or not, the newest last.
    """

    window: int = 10

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        known = dict(memory.get("reward_means", {}))
        for name, mean in reward_means(rollouts).items():
            known[name] = [*known.get(name, []), mean][-2 * self.window :]
        return {**memory, "reward_means": known}
