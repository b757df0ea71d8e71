"""What a student does in whole episodes: how often it wins, and how far it is from its teacher in
each turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.environments import Dialogue, EnvironmentSettings, EpisodeSampler
from opdkit.sampling import HFSampler
from opdkit.types import DataRow, Prompt, Rollout, Sampling


@dataclass(frozen=True)
class Measured:
    """Of whole episodes, nothing replayed.

    Arguments:
        won: the share of won episodes of each game, by id.
        kl: mean KL(student || teacher) per token of each turn, in nats, from the first turn on.
        turns: mean number of turns of an episode.
        tokens: how many tokens each of the turns is the mean of.
    """

    won: dict[str, float]
    kl: list[float]
    turns: float
    tokens: list[int]

    @property
    def success(self) -> float:
        return sum(self.won.values()) / len(self.won)

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "success": self.success}


def measure(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    world: EnvironmentSettings,
    rows: Sequence[DataRow],
    sampling: Sampling,
    seed: int,
) -> Measured:
    """Lives `sampling.num_generations` episodes of each game, the student's and then scored."""
    sampler = EpisodeSampler(
        HFSampler(student, tokenizer),
        Dialogue(tokenizer),
        world.make,
        world.kind,
        world.max_turns,
        world.turn_tokens,
    )
    prompts = [Prompt(row["id"], [], row=row) for row in rows]
    rollouts = sampler.sample(prompts, sampling, seed=seed, step=None)
    won: dict[str, list[bool]] = defaultdict(list)
    for rollout in rollouts:
        won[rollout.question].append(bool(rollout.correct))
    sums, counts = kl_by_turn(rollouts, student, teacher, tokenizer.pad_token_id)
    lengths = [1 + max(r.turns) for r in rollouts]
    return Measured(
        {game: sum(each) / len(each) for game, each in won.items()},
        [s / max(n, 1) for s, n in zip(sums, counts)],
        sum(lengths) / len(lengths),
        counts,
    )


@torch.no_grad()
def kl_by_turn(
    rollouts: Sequence[Rollout], student: Any, teacher: Any, pad: int, size: int = 16
) -> tuple[list[float], list[int]]:
    """The sum of KL(student || teacher) over the student's tokens of each turn, over the whole
    vocabulary, and how many tokens these are.
    """
    deepest = 1 + max(max(r.turns) for r in rollouts)
    sums, counts = torch.zeros(deepest, dtype=torch.float64), torch.zeros(deepest)
    for start in range(0, len(rollouts), size):
        some = rollouts[start : start + size]
        width = max(len(r.prompt) + len(r.tokens) for r in some)
        ids = torch.full((len(some), width), pad)
        turn = torch.full((len(some), width), -1)  # of tokens that are not the student's
        for i, r in enumerate(some):
            begin, end = len(r.prompt), len(r.prompt) + len(r.tokens)
            ids[i, :end] = torch.tensor(r.prompt + r.tokens)
            mine = torch.tensor(r.drawn)
            turn[i, begin:end] = torch.tensor(r.turns).where(mine, torch.tensor(-1))
        apart, at = kl(student, teacher, ids), turn[:, 1:]  # [B, T - 1]
        own = at >= 0
        sums.index_add_(0, at[own], apart[own].double())
        counts.index_add_(0, at[own], torch.ones(int(own.sum())))
    return sums.tolist(), [int(n) for n in counts]


def kl(student: Any, teacher: Any, ids: Tensor) -> Tensor:
    """[B, T - 1]: KL(student || teacher) of what follows each token of ids [B, T], in nats."""
    s, t = (
        model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        for model in (student, teacher)
    )
    return (s.exp() * (s - t)).sum(-1)
