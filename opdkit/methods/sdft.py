"""Self-distillation fine-tuning: the student that has seen a demonstration teaches the one that has
not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.arguments import itself, positive, shares
from opdkit.methods.method import Method
from opdkit.objective import JSD, Batch, Divergence, Objective, Outer, RowMean, Signal


@dataclass(frozen=True)
class From(Signal):
    """[B, T] bool: the tokens of a response from number `first` on, the first being number 0."""

    first: int

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        places = torch.arange(batch.shape[1], device=batch.device)
        return (places >= self.first).expand(batch.shape)


def sdft(
    alpha: float = 1.0,
    n_skip: int = 3,
    cap_ratio: float = 2.0,
    teacher: str = "ema",
    rate: float = 0.01,
) -> Method:
    """SDFT: a demonstration, shown to a copy of the student, becomes a teacher of the student's own
    answers, which forget less than the demonstration itself would make it.

        D_t = alpha KL(pi_t || M) + (1 - alpha) KL(pi_s || M), M = alpha pi_t + (1 - alpha) pi_s
              alpha 0: KL(pi_t || pi_s), 1: KL(pi_s || pi_t);  over the whole vocabulary
        w   = mean over the rollout's tokens t >= n_skip of min(pi_s before the step / pi_sampler,
              cap_ratio)
        w D_t, mean over each rollout's tokens t >= n_skip, then over all rollouts

        pi_t = an average of the student under prompt + demonstration

    The first n_skip tokens ("Based on the example ...") are in neither sum nor count; a rollout
    that has no others counts as one with loss 0. w is 1 where the sampler is the trainer; elsewhere
    it weighs a whole rollout by how far the engine that wrote it is off.

    Source: arXiv 2601.19897 and its code. Where sources disagree: the paper argues for reverse KL
    (here), the released code runs forward KL, alpha = 0. Not offered: rollouts written by the
    teacher, the quantile of most uncertain tokens (see `tip`) and a penalty to a base model, all
    off in the code.

    Arguments:
        alpha: where the divergence lies between forward (0) and reverse KL (1), in [0, 1]. Default:
            the paper's; the released code has 0.
        n_skip: tokens at the start of every rollout that are not trained, at least 0. Default: the
            code's.
        cap_ratio: largest ratio of trainer to sampler that counts at a token, above 0; infinity:
            no bound. Default: the code's.
        teacher: weights of the teacher: "ema" (a moving average of the student's), "fixed" (those
            at the start of the run), "live" (the student's own). Default: the paper's.
        rate: share of the way that the average moves to the student at every optimiser step, in
            [0, 1]: 0 is "fixed", 1 "live". Default: the code's.
    """
    shares(
        alpha=(alpha, "0 is forward KL, 1 reverse KL"),
        rate=(rate, "it is the share of the way that the teacher's average moves to the student"),
    )
    if n_skip < 0:
        raise ValueError(f"n_skip={n_skip} must be at least 0: it counts tokens that are passed by")
    positive(cap_ratio=(cap_ratio, "it is the largest ratio of trainer to sampler that counts"))
    kept = From(n_skip)
    off = RowMean(Outer("sampler", cap_ratio), among=kept)
    return Method(
        Objective(Divergence(JSD(alpha)).per("own_rows") * kept * off),
        models={"teacher": itself("demonstration", teacher, rate=rate)},
    )
