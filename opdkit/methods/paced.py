"""PACED: distillation at the frontier of the student's competence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.curricula import PassRates
from opdkit.methods.method import Method
from opdkit.objective import Batch, Divergence, Early, Kind, Objective, PassRate, Signal


@dataclass(frozen=True)
class Frontier(Signal):
    """[B, 1]: p^a (1 - p)^b, highest at p = a / (a + b); as it is ("none") or over its mean over
    the step's rollouts ("mean").
    """

    rate: Signal
    a: float
    b: float
    normalise: str

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        p = self.rate(batch)
        weight = p**self.a * (1 - p) ** self.b
        if self.normalise == "none":
            return weight
        mean = weight[batch.mask.any(1)].sum() / batch.mask.any(1).sum().clamp_min(1)
        return weight / torch.where(mean == 0, 1.0, mean)


def paced(
    a: float = 1.0,
    b: float = 1.0,
    kind: str | Kind = "forward_kl",
    two_stage: bool = False,
    normalise: str = "mean",
) -> Method:
    """PACED: prompts always solved teach nothing, prompts never solved nothing coherent; weigh by
    how close a prompt is to the frontier.

        weight p^a (1 - p)^b of a rollout whose prompt is solved with pass rate p
        divergence over the whole vocabulary, mean over each rollout's tokens, then over rollouts
        weights have mean 1 over the step's rollouts (with their sum as divisor: the same number)

    p is the share of correct ones among the prompt's last rollouts, before this step; of a prompt
    not seen yet, among its rollouts of this step. p = 0 or 1 weighs nothing, so a prompt needs
    several: give the run num_generations of 4 or more.

    Source: arXiv 2603.11178; the weighting has no public code. Ours: mean 1, the switch at half,
    pass rates renewed as training goes (the paper estimates them with the initial student), and
    student prefixes for forward KL too (there: reference responses). Not offered: smoothed pass
    rates, the paper's baselines.

    Arguments:
        a: power of the pass rate, at least 0; with b it puts the peak at a / (a + b), and a > b
            prefers easier prompts. Default: the paper's.
        b: power of the failure rate, at least 0. Default: the paper's.
        kind: the divergence, by name or as a `Kind` (see `opd`). Default: the paper's distillation
            from a teacher; its self-distillation has "reverse_kl".
        two_stage: whether the second half of the run has reverse KL in the place of `kind`.
            Default: off, the paper's single stage.
        normalise: "mean" divides the weights by their mean over the step's rollouts, "none" leaves
            them. Default: ours; the paper's is not stated.
    """
    if a < 0 or b < 0:
        raise ValueError(
            f"a={a}, b={b} must not be negative: the weight p^a (1 - p)^b must stay finite at p = "
            "0 and 1"
        )
    if normalise not in ("mean", "none"):
        raise ValueError(f"normalise={normalise!r} must be 'mean' or 'none'")
    weight = Frontier(PassRate(), a, b, normalise)
    first, then = (
        Divergence(kind).per("rows") * weight,
        Divergence("reverse_kl").per("rows") * weight,
    )
    objective = Objective(first * Early(0.5), then * ~Early(0.5)) if two_stage else Objective(first)
    return Method(objective, curriculum=PassRates())
