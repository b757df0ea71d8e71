"""OPD with generalised advantage estimation (experimental)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.objective import Batch, Const, Gap, LogRatio, Objective, PolicyGradient, Signal
from opdkit.objective.maths import side_by_side, to_go


@dataclass(frozen=True)
class GAE(Signal):
    """[B, T]: sum_l (g lam)^l delta_{t+l}, delta_t = r_t + g V_{t+1} - V_t; steps count the
    student's tokens, V is 0 behind the last.
    """

    of: Signal
    baseline: Signal
    discount: float
    lam: float

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        def sums(r: Tensor, v: Tensor) -> Tensor:  # [B, T] each
            delta = r + self.discount * torch.nn.functional.pad(v[:, 1:], (0, 1)) - v
            return to_go(delta, self.discount * self.lam)

        r, v = (s(batch).expand(batch.shape).to(batch.dtype) for s in (self.of, self.baseline))
        return side_by_side(batch.mask, sums, r, v)


def gae_opd(
    discount: float = 1.0,
    lam: float = 0.95,
    value: str = "kl",
) -> Objective:
    """GAE-OPD (experimental): each token is also credited with what its successors earn, less a
    value that cuts the variance.

        credit A_t = sum_l (g lam)^l delta_{t+l},   delta_t = r_t + g V_{t+1} - V_t
        V_t = -KL(pi_s || pi_t)(y_<t),   g = discount;   mean over all tokens

    V_t is the exact value of a prefix for immediate credit: g = 0 is `vopd` for every lam. For g >
    0 it is that of the next token alone, so lam < 1 is biased. `value` "zero" has no baseline: lam
    = 1 is then the discounted return, `opd(discount=g)`.

    Source: named, not tested, in the survey arXiv 2606.22793; the formula is a reconstruction. Not
    offered: a learnt critic.

    Arguments:
        discount: g: factor per token of what later tokens earn, in [0, 1]. Default: ours; the
            survey states none.
        lam: how far the sum reaches: 0 one token ahead, 1 to the end; in [0, 1]. Default: ours; the
            survey states none.
        value: V: "kl", the exact value for immediate credit, or "zero", no baseline. Default: ours;
            the survey states none.
    """
    if value not in ("kl", "zero"):
        raise ValueError(f"value={value!r} must be 'kl' or 'zero'")
    baseline = -Gap("reverse_kl") if value == "kl" else Const(0)
    return Objective(PolicyGradient(GAE(LogRatio("teacher", "student"), baseline, discount, lam)))
