"""Distillation on a part of each rollout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.objective import Batch, Const, LogRatio, Objective, PolicyGradient, Progress, Signal


@dataclass(frozen=True)
class Part(Signal):
    """[B, T] bool: the first or last max(1, ceil(share * L)) of a row's L trained tokens."""

    end: str
    share: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        mask = batch.mask.long()
        length = mask.sum(1, keepdim=True)
        # 0.1 * 30 is a little more than 3
        keep = (self.share(batch).double() * length - 1e-9).ceil().clamp_min(1)
        order = mask.cumsum(1) if self.end == "first" else length - mask.cumsum(1) + 1
        return batch.mask & (order <= keep)


@dataclass(frozen=True)
class Cosine(Signal):
    """[1, 1]: (1 - cos(pi s)) / 2, s the share of the run that is done."""

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        return 0.5 * (1 - torch.cos(math.pi * Progress()(batch)))


def position_opd(
    part: str = "first",
    share: float = 0.3,
    anneal: str | None = None,
) -> Objective:
    """OPD on the first (or last) share of each rollout: where in a response the signal is.

        credit r_t on max(1, ceil(share L)) of the L trained tokens of each rollout, none elsewhere
        sum divided by ALL trained tokens

    Source: the position ablations of arXiv 2606.22600: the first 30 % teach about as much as all
    tokens, the last 30 % almost nothing.

    Arguments:
        part: which end of each rollout is trained: "first" or "last". Default: the end at which the
            paper finds the signal.
        share: share of each rollout's trained tokens, in (0, 1]. Default: the paper's first 30 %.
        anneal: how the share grows to 1 over the run: "cosine", "linear", or None (it stays).
            Default: the paper's fixed prefix.
    """
    if part not in ("first", "last"):
        raise ValueError(f"part={part!r} must be 'first' or 'last'")
    if anneal not in (None, "cosine", "linear"):
        raise ValueError(f"anneal={anneal!r} must be 'cosine', 'linear' or None")
    grown: Signal = Const(share)
    if anneal is not None:
        grown = share + (1 - share) * (Cosine() if anneal == "cosine" else Progress())
    return Objective(PolicyGradient(LogRatio("teacher", "student")) * Part(part, grown))
