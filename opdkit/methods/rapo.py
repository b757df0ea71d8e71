"""RAPO: the student need only cover what the reference can write, and where that failed a flatter
version of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.methods.arguments import not_negative, one_of, shares
from opdkit.methods.grpo import grpo
from opdkit.objective import (
    Ceiling,
    EntropyBonus,
    Floor,
    Live,
    Objective,
    Reward,
    Signal,
    TokenLoss,
)
from opdkit.objective.kernels import Vocabulary
from opdkit.objective.maths import straight

MOST = 10.0  # of |log w|, in nats: w log w of more would be all that a step learns


def covering(log_q: Tensor, log_p: Tensor, kl_grad: str) -> Tensor:
    """[...]: f(w) = w log w - w + 1 of w = q(y) / p(y), log q(y) and log p(y) [...]: on average
    over y of p it is KL(q || p). Its gradient in log p(y) is its own, -w log w, or ("score") that
    of the KL, 1 - w.
    """
    log_w = (log_q - log_p).clamp(-MOST, MOST)
    value = log_w.exp() * log_w - torch.expm1(log_w)
    if kl_grad == "autograd":
        return value
    return straight(value, -torch.expm1(log_w).detach() * log_p)


@dataclass(frozen=True)
class Covering(TokenLoss):
    """KL(q || student) as the sampled token tells it (see `covering`), q the reference at the power
    `power` of its rollout, normalised over the vocabulary.
    """

    power: Signal  # [B, 1]
    kl_grad: str
    name: ClassVar[str] = "covering"

    def value(self, live: Live) -> Tensor:  # [n]
        logits = live.vocabulary("reference").logits
        # what the reference rules out stays out, also at power 0
        flat = torch.where(logits > -torch.inf, live.pick(self.power)[:, None] * logits, logits)
        log_q = Vocabulary(flat).at(live.tokens[:, None])[:, 0]
        return covering(log_q, live.logp, self.kl_grad)


def rapo(
    alpha: float = 0.01, beta: float = 0.001, phi_min: float = 0.5, kl_grad: str = "autograd"
) -> Objective:
    """RAPO: a penalty that holds the student to the reference's own choices keeps it from new ones;
    here it must only cover them, and where an answer failed a flatter version of them.

        max(-A r, -A clip(r))  +  alpha (w log w - w + 1)  -  beta H(pi_s)
        w = q(y_t) / pi_s(y_t),   q = pi_ref^phi / its sum over the vocabulary
        phi = phi_min + (1 - phi_min) R of a rollout, R its reward within 0 .. 1
        A = (R - mean) / (std + 1e-6),   r = pi_s / pi_s before the step
        mean over each rollout's tokens, then over rollouts

    On average over the student's tokens the second part is KL(q || pi_s). Differentiated as it
    stands ("autograd") it raises log pi_s(y_t) by w log w, next to nothing where the student is far
    above the reference; "score" has the KL's own gradient, w - 1, and the same value. log w counts
    within -10 .. 10: beyond, "autograd" has no gradient, and that of "score" grows no more. phi = 1
    is the reference itself, 0 a uniform q.

    Source: arXiv 2510.03865, as a summary quotes it (no official code). Ours: the tempering at each
    token with its exact normaliser, the form of phi, and all weights, which are not known.
    Departure: std + 1e-6 and the sample std, as everywhere. Not offered: phi on the likelihood of
    the whole sequence, the other reading; a reference that says sampled tokens only.

    Arguments:
        alpha: weight of the penalty, at least 0; 0 loads no reference. Default: ours.
        beta: weight of the student's entropy, at least 0. Default: ours.
        phi_min: power of the reference where the reward is 0 or less, in [0, 1]; 1 leaves it as it
            is whatever the reward. Default: ours.
        kl_grad: what is followed of the penalty: "autograd", the gradient of the estimate, or
            "score", that of the KL. Default: what the paper's text implies.
    """
    one_of(kl_grad=(kl_grad, ("autograd", "score")))
    shares(phi_min=(phi_min, "it is the power of the reference where the reward is 0"))
    not_negative(alpha=(alpha, "it weighs the penalty"), beta=(beta, "it weighs the entropy"))
    objective = grpo()
    if alpha:
        power = phi_min + (1 - phi_min) * Floor(Ceiling(Reward(), 1), 0)
        objective += (Covering(power, kl_grad) * alpha).per("rows")
    return objective + (EntropyBonus() * beta).per("rows") if beta else objective
