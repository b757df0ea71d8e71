"""FG-ExPO: a KL to the reference that lets go where the student fails, and prompts at the frontier
of what it can do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.curricula import Frontier
from opdkit.methods.arguments import not_negative
from opdkit.methods.grpo import grpo
from opdkit.methods.method import Method
from opdkit.objective import Batch, Estimator, Signal


@dataclass(frozen=True)
class Solved(Signal):
    """[1, 1] in [0.5, 0.88]: (tanh(a) + 1) / 2 of the mean reward a of the step's rollouts, those
    within 0 .. 1.
    """

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        mean = batch.reward.to(batch.dtype).clamp(0, 1).mean()
        return ((torch.tanh(mean) + 1) / 2).view(1, 1)


def fg_expo(beta: float = 0.02, sigma: float = 0.35, smoothing: float = 0.9) -> Method:
    """FG-ExPO: the worse the student does in a step, the less it is held to the reference; and
    prompts that it solves about half the time are asked most.

        max(-A r, -A clip(r))  +  beta (tanh(a) + 1) / 2 * k3
        a = mean reward of all rollouts of the step,   k3 = exp(d) - d - 1,   d = log(pi_ref/pi_s)
        A = (R - mean) / (std + 1e-6),   r = pi_s / pi_s before the step
        mean over each rollout's tokens, then over rollouts

        prompts:  w = exp(-(p - 0.5)^2 / (2 sigma^2)),   drawn from the whole data set by w
                  p <- smoothing p + (1 - smoothing) (share of right ones), where it was asked;
                  0.5 before

    The factor lies between 0.5 (nothing solved) and 0.88 (all), one number per step. Prompts are
    those of the curriculum `frontier`, which is saved with the run.

    Source: arXiv 2605.11403 (earlier: 2605.09923). Ours: a batch asks no prompt twice (not said);
    rewards count within 0 .. 1; rollouts that a filter drops are in no mean. Departure: std + 1e-6
    and the sample std, as everywhere. A public implementation with beta (1 - a)^2 goes the other
    way.

    Arguments:
        beta: weight of the KL to the reference before the factor, at least 0; 0 loads no reference
            and is `grpo` on these prompts. Default: the paper's.
        sigma: width of the weight around a pass rate of 0.5, above 0; large ones ask all prompts
            alike. Default: the paper's.
        smoothing: share of a prompt's old pass rate that stays when it is asked again, at least 0
            and below 1. Default: the paper's.
    """
    not_negative(beta=(beta, "it is the weight of the KL to the reference"))
    objective = grpo()
    if beta:
        objective += (Estimator("k3", "reference") * (Solved() * beta)).per("rows")
    return Method(objective, curriculum=Frontier(sigma=sigma, smoothing=smoothing))
