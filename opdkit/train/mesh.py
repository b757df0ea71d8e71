"""Several processes that train one student: who works on what, and how what each found becomes the
whole. No other file of the loop knows that there may be several.

Every process holds all rollouts of a step. It scores and learns its own part of their tokens; facts
[B, T] are then summed over the processes, after which signals, counts, means, quantiles and group
statistics are computed from whole tensors and are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from opdkit.types import Rollout

Thing = TypeVar("Thing")


class Mesh(Protocol):
    """What the loop asks of the processes that share a run."""

    rank: int  # of this one, from 0
    size: int  # how many there are

    def mine(self, rollouts: Sequence[Rollout], width: int) -> Tensor:
        """[B, width] bool: the tokens that this process scores and learns; of every token that is
        one process.
        """
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, of one shape everywhere."""
        ...

    def every(self, thing: Thing) -> list[Thing]:
        """What each process has, in the order of their ranks: a small object."""
        ...


class Alone:
    """One process: all is its own, and what it has is the whole."""

    rank, size = 0, 1

    def mine(self, rollouts: Sequence[Rollout], width: int) -> Tensor:  # [B, width] bool
        return torch.ones(len(rollouts), width, dtype=torch.bool)

    def total(self, values: Tensor) -> Tensor:  # as `values`
        return values

    def every(self, thing: Any) -> list[Any]:
        return [thing]


ALONE = Alone()


def by_length(rollouts: Sequence[Rollout], size: int) -> list[int]:
    """The rank that works on each rollout: the longest first, each to who has the fewest tokens so
    far; the same on every process.
    """
    loads, owner = [0] * size, [0] * len(rollouts)
    length = [len(r.prompt) + len(r.tokens) for r in rollouts]
    for b in sorted(range(len(rollouts)), key=lambda b: (-length[b], b)):
        owner[b] = loads.index(min(loads))
        loads[owner[b]] += length[b]
    return owner
