"""Adaptive layerwise perturbation: noise on the layers of the student that learns smooths its
ratios to whatever sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.methods.arguments import not_negative, one_of
from opdkit.methods.method import Method
from opdkit.objective import (
    Advantage,
    Batch,
    Bounds,
    Const,
    Estimator,
    LayerNoise,
    Live,
    LogRatio,
    Objective,
    Signal,
    TokenLoss,
    log_ratio,
)
from opdkit.objective.losses import MOST_APART, base_logp
from opdkit.objective.maths import row_mean, side_by_side


@dataclass(frozen=True)
class Reach(Signal):
    """[B, T] or [B, 1]: log pi_s - log pi_sampler, pi_s the student as it learns now, summed over a
    rollout: "sequence" all of it, "geometric" their mean, "cumulative" up to each token.
    """

    over: str

    def value(self, batch: Batch) -> Tensor:  # [B, T] or [B, 1]
        apart = LogRatio("live", "sampler")(batch)
        if self.over == "cumulative":
            return side_by_side(batch.mask, lambda x: x.cumsum(1), apart)
        if self.over == "geometric":
            return row_mean(apart, batch.mask)
        return torch.where(batch.mask, apart, 0.0).sum(1, keepdim=True)


@dataclass(frozen=True)
class OneRatio(Bounds, TokenLoss):
    """PPO's clipped loss, [n], of one ratio: of the student as it learns now to the sampler itself,
    not to the student before the step; `cap` bounds it too. With `reach` its logarithm is that
    number, and its gradient that of the token's own log-prob.
    """

    reach: Signal | None = None
    takes_region: ClassVar[bool] = True

    @property
    def outer(self) -> Signal:
        return Const(1)

    @property
    def around(self) -> str | Signal:
        return self.base

    def value(self, live: Live) -> Tensor:  # [n]
        if self.reach is None:
            log_r = log_ratio(live, self.base)
        else:
            log_r = live.pick(self.reach) + (live.logp - live.logp.detach())
        r = log_r.clamp(-MOST_APART, MOST_APART).exp().clamp_max(self.cap or math.inf)
        return self.bounded(r, live.pick(self.credit), live.logp, base_logp(live, self.base))


def alp(
    mode: str = "sequence",
    sigma: float = 0.01,
    layers: tuple[int, int] | None = None,
    c: float | None = 10.0,
    geometric: bool = False,
    learning_rate: float = 5e-4,
    reference_kl: float = 0.0,
) -> Method:
    """ALP: the student learns with noise on its layers, so that its ratios to a sampler that is
    slightly another model (engine, precision, older weights) keep in range.

        h_l <- h_l + sigma_l xi_l before decoder layer l, xi_l ~ N(0, 1), sigma_l learnt
        lr_t = log pi~_s - log pi_sampler,   pi~_s the student with the noise
        log rho_t = lr_t                                                    mode "token"
                    sg(sum of lr over the rollout) + log pi~_s - sg(log pi~_s)       "sequence"
                    sg(sum of lr up to t) + log pi~_s - sg(log pi~_s)              "cumulative"
        max(-A rho, -A clip(rho, 0.5, 4)), at most -A c where A < 0
        A = (R - mean) / (std + 1e-6) over the rollouts of a prompt; mean over all tokens

    One ratio does for both that of PPO and that to the sampler; nothing is read of the student
    before the step. Rollouts are written, and everything but the student that learns is scored,
    without noise. It is drawn anew at every optimiser step, keyed by (seed, step, layer, rollout,
    position, unit), so that micro-batches and layers computed twice are given the same. A formula
    on plain logits (`evaluate`) has no layers and no noise. Added to another method with +, its
    noise is in that one's live pass too.

    Source: arXiv 2603.19470 and its code (multi-turn settings; the single-turn script fixes
    sigma = 0.02, `learning_rate` 0; its multi-turn one starts at 1e-6). Departure: the code draws
    noise anew for every micro-batch; here a whole optimiser step is one draw, without which a sum
    over the rollout would be of another noise than the token's.

    Arguments:
        mode: over what the ratio is taken: "sequence", "token" or "cumulative". Default: the
            paper's best.
        sigma: width of the noise at the start, in units of hidden states, at least 0; 0: no noise
            (the paper's "bypass"). Default: the model configuration of the released code.
        layers: (start, end), the decoder layers with noise, counted from 0, that at `end` without;
            None: all. Default: the paper's.
        c: bound on the loss of tokens with negative advantage, as a multiple of |A|; above 1, None:
            no bound. Default: the paper's.
        geometric: whether mode "sequence" takes the mean over tokens in the place of the sum.
            Default: off, as in the paper.
        learning_rate: of log sigma_l, at least 0; 0: the widths stay. Default: the paper's.
        reference_kl: weight of a k3 penalty that keeps the student near the reference, per token;
            at least 0, 0 loads no reference. Default: off; the code has 1e-3 where it is on.
    """
    one_of(mode=(mode, ("token", "sequence", "cumulative")))
    if geometric and mode != "sequence":
        raise ValueError(f"geometric is of mode='sequence': mode={mode!r} takes no mean")
    not_negative(sigma=(sigma, "it is a width"), learning_rate=(learning_rate, "0: widths stay"))
    not_negative(reference_kl=(reference_kl, "it is the weight of the penalty"))
    reach = None if mode == "token" else Reach("geometric" if geometric else mode)
    objective = Objective(OneRatio(Advantage(), 0.5, 3.0, c, reach=reach))
    if reference_kl:
        objective += Estimator("k3", "reference") * reference_kl
    noise = (LayerNoise(sigma, layers, learning_rate),) if sigma else ()
    return Method(objective, companions=noise)
