"""TIP: distillation on the tokens that matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.arguments import one_of
from opdkit.objective import (
    Batch,
    Const,
    Divergence,
    Entropy,
    Gap,
    Objective,
    Quantile,
    Signal,
    uniform,
)
from opdkit.objective.maths import masked_quantile


@dataclass(frozen=True)
class Spread(Signal):
    """[B, T] in [0, 1]: a signal between its least value and its quantile `top` in the step; 0
    everywhere where these are equal.
    """

    of: Signal
    top: float = 1.0

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        values = self.of(batch)
        low, high = (masked_quantile(values, batch.mask, at) for at in (0.0, self.top))
        return (torch.minimum(values, high) - low) / torch.where(high > low, high - low, math.inf)


@dataclass(frozen=True)
class SampleKeys(Signal):
    """[B, T]: draws of which the n highest are a sample of n tokens without replacement, odds
    proportional to a signal.

    Prints as `Race(...)`: the printed form is the key of the draws, and runs that are taken up
    again must draw the same.
    """

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        # the least odds of the official code
        return torch.log1p(-uniform(batch, str(self))) / self.of(batch).clamp_min(1e-8)

    def __str__(self) -> str:
        return f"Race({self.of})"


@dataclass(frozen=True)
class Highest(Signal):
    """[B, T] bool: the share of each rollout's trained tokens, or of the whole step's, where a
    signal is highest; earlier first on ties.

    They are looked for `among` some of the tokens; where these are fewer, they are all of them. The
    tokens are those that `authors` wrote (see `types.AUTHORS`).
    """

    of: Signal
    share: float
    among: Signal
    least: int = 0
    whole: bool = False
    authors: tuple[str, ...] = ("student",)

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        pool, mask = (1, -1) if self.whole else batch.shape, batch.by(self.authors)
        among = (mask & self.among(batch).bool()).reshape(pool)
        values = torch.where(among, self.of(batch).reshape(pool), -math.inf)
        count = mask.reshape(pool).sum(1, keepdim=True).double()
        # 0.29 * 100 is a little less than 29
        keep = (self.share * count + 1e-9).floor().clamp_min(self.least)
        rank = values.argsort(dim=1, descending=True, stable=True).argsort(1)
        return (among & (rank < keep)).reshape(batch.shape)


def tip(
    share: float = 0.5, score: str = "soft_or", selection: str = "top", least: int = 0
) -> Objective:
    """TIP: reverse KL on the tokens where the student is unsure or at odds with the teacher,
    nothing on the rest.

        KL(pi_s || pi_t) over the whole vocabulary, mean over the kept tokens
        kept: the floor(share L) highest scores of each rollout of L tokens

        soft_or:  h + d - h d,   h = H(pi_s) up to its 98th percentile,   d = KL(pi_s || pi_t),
                  each spread over [0, 1] in the step
        entropy:  H(pi_s), which drops confident errors
        q3:       d among the step's less uncertain half of the tokens

    Scores are those before the step and need no division by log V.

    Source: arXiv 2604.14084. Departures: the official sampling draws inside each micro-batch, which
    lets its size change the gradient. The thresholds of q3 are ours. Not offered: exponents of the
    odds other than 1, and their JSD factor.

    Arguments:
        share: share of the tokens that is trained, in (0, 1]; 1 is OPD on the whole vocabulary.
            Default: the paper's; it also has 0.2.
        score: what chooses tokens: "soft_or", "entropy" or "q3". Default: the paper's.
        selection: "top" keeps the highest scores of each rollout, "sample" draws max(1, floor(share
            N)) of the step's N tokens without replacement, with odds proportional to the score.
            Default: the paper's; the official code samples.
        least: least number of tokens kept of each rollout, where it has so many; at least 0.
            Default: the paper's rule, which has none.
    """
    one_of(score=(score, ("soft_or", "entropy", "q3")), selection=(selection, ("top", "sample")))
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie in (0, 1]: the share of tokens that are trained")
    h, d = Entropy("student"), Gap("reverse_kl")
    uncertainty, distance = Spread(h, 0.98), Spread(d)
    of: Signal = {
        "soft_or": uncertainty + distance - uncertainty * distance,
        "entropy": h,
        "q3": d,
    }[score]
    among = h <= Quantile(h, 0.5) if score == "q3" else Const(1)
    kept = (
        Highest(of, share, among, least)
        if selection == "top"
        else Highest(SampleKeys(of), share, among, max(least, 1), whole=True)
    )
    return Objective(Divergence("reverse_kl").per("own") * kept)
