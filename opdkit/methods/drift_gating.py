"""Blockwise policy-drift gating."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.method import Method, as_method
from opdkit.objective import Batch, Exp, LogRatio, Mark, MeanOne, Objective, RolloutLoss, Signal
from opdkit.objective.algebra import weigh


@dataclass(frozen=True)
class Blocks(Signal):
    """[B, T] int: the number of the block a response position is in.

    A block has at most `size` positions.

    With `ends` it also closes where they hold, once it has a quarter of `size`: short spans join
    the next, long ones are split.
    """

    size: int
    ends: Signal | None = None

    def value(self, batch: Batch) -> Tensor:  # [B, T] int
        rows, width = batch.shape
        ends = (
            [[]] * rows
            if self.ends is None
            else [row.nonzero()[:, 0].tolist() for row in self.ends(batch).cpu()]
        )
        first = []  # flat positions at which a block begins
        for row, stops in enumerate(ends):
            start = 0
            for stop in [*(end + 1 for end in stops), width]:
                first += [row * width + at for at in range(start + self.size, stop, self.size)]
                start += (stop - start - 1) // self.size * self.size
                if 4 * (stop - start) >= self.size and stop < width:
                    first.append(row * width + stop)
                    start = stop
        begins = torch.zeros(rows * width, dtype=torch.int64, device=batch.device)
        begins[torch.tensor(first, dtype=torch.int64, device=batch.device)] = 1
        return begins.view(rows, width).cumsum(1)


@dataclass(frozen=True)
class BlockMean(Signal):
    """[B, T]: the mean of a signal over the trained tokens of each position's block."""

    of: Signal
    blocks: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        index, values = self.blocks(batch), torch.where(batch.mask, self.of(batch), 0.0)
        total, count = (
            torch.zeros_like(values).scatter_add(1, index, x)
            for x in (values, batch.mask.to(values.dtype))
        )
        return (total / count.clamp_min(1)).gather(1, index)


def drift_gating(
    base: str | Method | Objective = "opd",
    block: int = 64,
    tau: float = 1.0,
    spans: str | None = None,
) -> Method:
    """BPDG: when rollouts are used for several updates, spans whose log-probs have moved since they
    were sampled count less.

        every term of `base` times g / mean g,   mean g over all trained tokens
        g = exp(-tau |mean over the block of log(live/sampler)|)

    live is the student of this very update, without gradient. The base's denominators stay. Blocks
    begin anew in each response. On fresh rollouts every gate is 1: it acts from the second update
    on.

    Source: arXiv 2606.24084, no public code. Ours: means are signed and over trained tokens, as in
    its text; the mean gate is that of the step; a newline ends a block of at least a quarter of
    `block`. A gate can exceed 1: it is relative, no trust region.

    Arguments:
        base: what is weighed: a method's name or expression, a method, or an objective without a
            loss over whole rollouts. Default: the first of the paper's two.
        block: length of a block in response positions, at least 1. Default: the paper's.
        tau: by how much drift, in nats per token, lowers a gate: exp(-tau |drift|); at least 0, 0
            is the base. Default: the paper's.
        spans: what else ends a block: "newline" (tokens whose text has one), or None. Default: the
            paper's first variant.
    """
    if block < 1 or tau < 0:
        raise ValueError(
            f"block={block} must be at least 1 token, and tau={tau} not negative: drift is to "
            "count less, never more"
        )
    if spans not in (None, "newline"):
        raise ValueError(f"spans={spans!r} must be None (blocks of fixed length) or 'newline'")
    made = as_method(base)
    if any(isinstance(term.loss, RolloutLoss) for term in made.objective.terms):
        raise ValueError(
            f"base={base} has a loss over whole rollouts, which cannot be weighted token by token: "
            "choose another base"
        )
    drift = BlockMean(
        LogRatio("live", "sampler"), Blocks(block, Mark("newline") if spans else None)
    )
    gate = MeanOne(Exp(-tau * abs(drift)))
    return Method(weigh(made.objective, str(base), gate, "drift_gating"), made.curriculum)
