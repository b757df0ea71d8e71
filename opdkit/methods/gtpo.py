"""GTPO: GRPO that leaves alone what right and wrong answers begin and end with, and answers that
have come apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.methods.arguments import not_negative
from opdkit.objective import (
    Advantage,
    Around,
    Batch,
    Companion,
    CompanionState,
    Entropy,
    Objective,
    PolicyGradient,
    RowMean,
    Signal,
    Stepped,
)
from opdkit.objective.maths import group_index, masked_mean, side_by_side


@dataclass(frozen=True)
class Alike(Signal):
    """[B, T] 0, 1 or 2: of how many runs a token is part, from its rollout's first token on and
    from its last one back, over which the same token stands at the same place in a rollout of the
    prompt with positive and in one with negative advantage; places are those of the student's
    tokens, and rollouts without advantage take no part.
    """

    advantage: Signal  # [B, 1]

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        sign = self.advantage(batch).sign()

        def run(ids: Tensor, written: Tensor) -> Tensor:  # [B, T] each, packed to the left
            place = torch.arange(ids.shape[1], device=ids.device)
            keys = (x.expand_as(ids).flatten() for x in (batch.group[:, None], place, ids))
            index, n = group_index(*keys)
            shared = (written > 0) & (sign != 0)
            for side in (sign > 0, sign < 0):
                there = index[(side & (written > 0)).flatten()]
                known = torch.zeros(n, dtype=torch.bool, device=ids.device).index_fill(
                    0, there, True
                )
                shared = shared & known[index].view_as(shared)
            return shared.to(batch.dtype).cumprod(1)

        mask, ids = batch.mask, batch.tokens.float()  # exact for ids below 2^24
        ones = torch.ones_like(ids)
        back = side_by_side(mask.flip(1), run, ids.flip(1), ones).flip(1)
        return side_by_side(mask, run, ids, ones) + back


@dataclass(frozen=True)
class Spared(Signal):
    """[B, T]: the weight of a token: at `alike` runs `weight` to that power where its rollout's
    advantage is positive and 0 where it is negative; 1 at none.
    """

    alike: Signal
    advantage: Signal  # [B, 1]
    weight: float

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        runs, good = self.alike(batch), self.advantage(batch) > 0
        return torch.where(good, self.weight**runs, (runs == 0).to(batch.dtype))


@dataclass(frozen=True)
class Count(Signal):
    """[B, 1]: how many of a rollout's tokens a signal is not 0 at; at least 1."""

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        return (self.of(batch) != 0).sum(1, keepdim=True).clamp_min(1).to(batch.dtype)


@dataclass(frozen=True)
class AtFirst(Signal, Companion):
    """[1, 1]: the mean of a signal over the tokens of the run's first step; a companion for itself,
    which remembers it.
    """

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        first = batch.companion(self).first
        mean = masked_mean(self.of(batch), batch.mask) if first is None else first
        return torch.as_tensor(mean, dtype=batch.dtype, device=batch.device).view(1, 1)

    def build(self, around: Around) -> CompanionState:
        return _AtFirst(self)


class _AtFirst(CompanionState):
    def __init__(self, what: AtFirst):
        self.what = what
        self.first: float | None = None

    def after_step(self, stepped: Stepped) -> None:
        if self.first is None and bool(stepped.batch.mask.any()):
            self.first = float(masked_mean(self.what.of(stepped.batch), stepped.batch.mask))

    def state_dict(self) -> Mapping[str, Any]:
        return {"first": self.first}

    def load_state_dict(self, state: Any) -> None:
        self.first = state["first"]


def gtpo(
    weight: float = 2.0,
    gamma: float = 0.1,
    threshold: float = math.log(2),
    official_code: bool = False,
) -> Objective:
    """GTPO: what right and wrong answers to a prompt begin or end with is never unlearnt, and an
    answer whose distributions have come apart teaches nothing.

        -c (A - gamma H) l_t rho_t,   mean over each rollout's tokens, then over rollouts
        A = R - mean of the prompt's rollouts,   H = mean entropy of the rollout, in nats
        c = 1 where H <= threshold, or the run began above it, else 0
        rho = pi_s / pi_s without gradient: 1
        l_t = weight^n where A > 0;  0 where A < 0 and n > 0;  else 1
        n of the runs that the token is in: from the first token on, and from the last one back,
        as long as the same token stands at the same place in a rollout with A > 0 and in one
        with A < 0

    Places count trained tokens: what tools or a guide wrote takes none. A is the one before the
    entropy is taken off, and includes rollouts that c leaves out; those keep their place in the
    mean. H is that of the student before the step. There is no ratio and no reference: it is meant
    for one update on each batch, and further ones take the policy gradient as it then is.

    The filter is in force if the student's mean entropy over the run's first step is at most
    `threshold`, as in the paper: one that starts above it would learn nothing. What it was then is
    saved with the run.

    Source: arXiv 2508.03772 and its code. Where sources disagree: the code's threshold is 0.7, in
    force always, and it divides each rollout's loss by the number of its tokens in runs, at least
    1, and sums over rollouts (`official_code`).

    Arguments:
        weight: factor of a token in a run where the advantage is positive, at least 0; a token in
            both has it twice. Default: the paper's.
        gamma: share of a rollout's mean entropy that is taken off its advantage, per nat, at least
            0. Default: the paper's.
        threshold: largest mean entropy of a rollout that is learnt from, in nats; infinity: all
            are, and no entropy is looked at for it. Default: the paper's, ln 2.
        official_code: whether rollouts are divided by their tokens in runs and summed, as in the
            released code. Default: off, the paper's formula.
    """
    not_negative(
        weight=(weight, "it is a factor of what right answers share with wrong ones"),
        gamma=(gamma, "it is the price of a nat of entropy"),
        threshold=(threshold, "it is the largest mean entropy of what is learnt from"),
    )
    advantage, entropy = Advantage("mean"), RowMean(Entropy("student"))
    alike, credit = Alike(advantage), advantage - gamma * entropy if gamma else advantage
    spared: Signal = Spared(alike, advantage, weight)
    if threshold < math.inf:
        began = AtFirst(Entropy("student")) > threshold
        spared = spared * ((entropy <= threshold) | began)
    term = PolicyGradient(credit, "live") * spared
    return Objective(
        (term * (1 / Count(alike))).per("row_means") if official_code else term.per("rows")
    )
