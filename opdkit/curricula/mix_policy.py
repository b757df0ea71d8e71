"""Early in a run, a share of each step's groups are those of the last few steps, and all are gone
through more than once; then it is on-policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from opdkit.base.rules import Rules, at_least, follow
from opdkit.curricula.base import Plain
from opdkit.curricula.recall import Recalled, again, kept
from opdkit.curricula.writer import Memory
from opdkit.objective.maths import keyed_uniform
from opdkit.types import Rollout, row_keys

RECENT = "recent"  # its entry in the memory
RULES: Rules = {
    "share": (
        lambda share: 0 <= share < 1,
        "at least 0 and below 1",
        "it is the share of a step's groups that earlier steps wrote, and at 1 nothing new is",
    ),
    "window": at_least(1, "it is how many steps back a group may have been written"),
    "utd": at_least(1, "it is how often a step goes through its rollouts"),
    "until": at_least(0, "it is the number of steps that are so; after them nothing is replayed"),
}


@dataclass(frozen=True)
class MixPolicy(Plain):
    """ReMix (arXiv 2507.06892): in the first `until` steps a `share` of the prompts of a step are
    not asked; in their place it has groups that one of the last `window` steps wrote, whole and
    with their rewards, and it goes through all of them `utd` times. From then on nothing is
    replayed, and passes are the run's.

    Replayed groups are drawn without replacement, keyed by seed and step, all alike: as every step
    writes as many, each of the last steps is as probable. As long as fewer are there, more is
    written; at least one prompt of a step is always asked. A step of n prompts replays round(share
    n) groups, of one prompt none.

    Memory is plain JSON: recent, with steps (how many were seen) and groups (of each of the last
    steps: rollouts as dicts), which is empty from the last of the `until` steps on.
    """

    kind: ClassVar[str] = "mix_policy"
    share: float = 0.4
    window: int = 2
    utd: int = 2
    until: int = 50

    def __post_init__(self) -> None:
        follow(RULES, self)

    @property
    def recalls(self) -> bool:
        return self.share > 0 and self.until > 0

    def passes(self, step: int, total_steps: int) -> int | None:
        return self.utd if step < self.until else None

    def recalled(self, count: int, step: int, seed: int, memory: Memory) -> Recalled:
        if step >= self.until:
            return Recalled()
        groups = [group for past in memory.get(RECENT, {}).get("groups", ()) for group in past]
        size = min(int(self.share * count + 0.5), count - 1, len(groups))
        if size <= 0:
            return Recalled()
        keys = row_keys([group[0]["id"] for group in groups])
        draws = keyed_uniform(seed, step, "mix policy", keys, 1, torch.float64)[:, 0]
        chosen = draws.argsort()[:size].tolist()
        return Recalled(instead=[again(row) for i in chosen for row in groups[i]])

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        """Memory with what the step has written; its replayed groups are not stored again."""
        if not self.recalls:
            return memory
        known = memory.get(RECENT, {"steps": 0, "groups": []})
        steps, groups = known["steps"] + 1, [*known["groups"], _groups(rollouts)][-self.window :]
        return {**memory, RECENT: {"steps": steps, "groups": groups if steps < self.until else []}}

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        """How many groups there were to replay."""
        past = memory.get(RECENT, {}).get("groups", ())
        return {"groups_to_replay": float(sum(map(len, past)))} if self.recalls else {}


def _groups(rollouts: Sequence[Rollout]) -> list[list[dict[str, Any]]]:
    """What a step wrote, group by group, each under a name of its own: the same prompt may be asked
    again in the step that has them again.
    """
    found: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.group, []).append(rollout)
    return [
        [kept(replace(r, group=f"again/{group[0].id}")) for r in group] for group in found.values()
    ]
