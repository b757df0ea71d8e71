"""SALSA: PPO whose reference is an average of several fine-tuned models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opdkit.methods.arguments import shares
from opdkit.methods.gae_opd import GAE
from opdkit.methods.method import Method
from opdkit.objective import (
    Batch,
    Clipped,
    LogRatio,
    Reward,
    Signal,
    Value,
    ValueHead,
    ValueLoss,
)


@dataclass(frozen=True)
class AtEnd(Signal):
    """[B, T]: a signal at the last of a rollout's trained tokens, 0 at the others."""

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        left = batch.mask.flip(1).long().cumsum(1).flip(1)  # trained tokens from each one on
        return self.of(batch) * (batch.mask & (left == 1))


def salsa(
    alpha: float = 0.5, beta: float = 0.05, discount: float = 1.0, lam: float = 0.95
) -> Method:
    """SALSA: PPO that is held near the average of several fine-tuned models, which is better
    centred than the one it starts from, so that the same KL leaves it more room.

        r_t = [t is the last] R - beta log(pi_s/pi_soup),   theta_soup = (1 - alpha) theta_1 + alpha
        theta_2
        A_t = sum_l (g lam)^l delta_{t+l},   delta_t = r_t + g V_{t+1} - V_t,   g = discount
        max(-A w, -A clip(w, 1 - low, 1 + high)),   w = pi_s / pi_s before the step
        (V_t - (A_t + V_t before the step))^2 / 2 moves V alone;   both a mean over all tokens

    V is a linear number of the student's hidden state before each token, with an optimiser of its
    own, and does not move the student. Log-ratios are those before the step. The run names the
    checkpoints, `reference=soup:A,B`, of one architecture and shape, and starts the student at A:
    the penalty is above 0 from the first step. With more than two, alpha is the share of all but
    the first, in equal parts; `reference.weights` says others. Weights are averaged in float32;
    adapters are merged first.

    Source: arXiv 2411.01798, which has no code; its settings of PPO were not at hand: those here
    are TRL's, without whitened advantages and a clipped value. alpha=0 is PPO.

    Arguments:
        alpha: share of the second checkpoint in the average, in [0, 1]; 0 is the first alone.
            Default: the paper's.
        beta: price of a nat of log(pi_s/pi_soup), at least 0. Default: TRL's for PPO.
        discount: g: factor per token of what later tokens earn, in [0, 1]. Default: TRL's.
        lam: how far the sum of A reaches: 0 one token ahead, 1 to the end; in [0, 1]. Default:
            TRL's.
    """
    shares(
        alpha=(alpha, "it is the share of the second checkpoint"),
        discount=(discount, "it is a factor per token"),
        lam=(lam, "it is how far the sum reaches"),
    )
    if beta < 0:
        raise ValueError(f"beta={beta} must be at least 0: it is the price of a nat")
    head = ValueHead()
    earned = AtEnd(Reward()) - LogRatio("student", "reference") * beta
    advantage = GAE(earned, Value(head), discount, lam)
    return Method(
        Clipped(advantage, 0.2, 0.2) + ValueLoss(advantage + Value(head), head, into_student=False),
        models={"reference": {"kind": "soup", "others": alpha}},
    )
