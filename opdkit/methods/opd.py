"""On-policy distillation in its standard forms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.objective import (
    JSD,
    Batch,
    Divergence,
    Kind,
    LogRatio,
    Objective,
    PolicyGradient,
    ReverseKL,
    Signal,
    Term,
    ToGo,
)
from opdkit.objective.divergences import kind_of
from opdkit.objective.losses import MOST_APART


@dataclass(frozen=True)
class SlopeCredit(Signal):
    """[B, T]: f'(1) - f'(pi_s/pi_t) of the sampled token before the step, for a divergence
    E_t[f(pi_s/pi_t)] at each prefix: nothing where the two agree. At most e^20 in size, but where
    the teacher rules the token out: what f' says then.
    """

    kind: Kind

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        apart = LogRatio("student", "teacher")(batch)
        credit = self.kind.slope(torch.zeros_like(apart)) - self.kind.slope(apart)
        most = math.exp(MOST_APART)
        return torch.where(apart.isinf(), credit, credit.clamp(-most, most))


def opd(
    support: str = "sampled",
    k: int | None = None,
    kind: str | Kind = "reverse_kl",
    beta: float | None = None,
    rest: str = "renormalise",
    discount: float = 0.0,
    as_credit: bool = False,
) -> Objective:
    """OPD: the teacher scores every token the student wrote.

        sampled:  -ratio_t r_t,   r_t = log pi_t(y_t) - log pi_s(y_t) before the step
        else:     the divergence over the support, backpropagated through the student at each prefix
        mean over all trained tokens

    The sampled form is a policy gradient whose expectation is the gradient of KL(student ||
    teacher) at each prefix; `discount` credits a token with later ones too (1: the gradient of the
    sequence KL; 0: immediate, the default everywhere). `support` "teacher", "student", "union" need
    k; a `kind` other than reverse KL, or `beta` (generalised JSD; 0 forward, 1 reverse), means the
    full vocabulary unless a support is named, or the drawn token with `as_credit`: its credit is
    f'(1) - f'(pi_s/pi_t), of a divergence E_t[f(pi_s/pi_t)] whose gradient is the expected one.
    That of reverse KL is r_t, of forward KL pi_t/pi_s - 1, of "jsd" log((1 + pi_t/pi_s) / 2) / 2,
    half of what the papers call JS: never below -log(2)/2 for a token that the teacher rejects. No
    credit but r_t is more than e^20.

    Source: GKD, arXiv 2306.13649; Thinking Machines Lab, "On-Policy Distillation" (2025); top-k
    forms arXiv 2603.25562; other credits arXiv 2302.08215, 2502.15681. Departures: token-mean, not
    the blog's sum; the discounted credit is masked again after the sum (in the blog's code prompt
    tokens keep some).

    Arguments:
        support: where the two models are compared: "sampled" (the token that was drawn, by policy
            gradient), "full" (the whole vocabulary), or the top k of the "teacher", of the
            "student", of either ("union") or of both ("intersection"). Default: the blog's.
        k: size of a top-k support in tokens, at least 1; None for the other two. Default: none, as
            none is needed; the top-k papers have 16 and 32.
        kind: the divergence: "reverse_kl", "forward_kl", "jsd", "skew_forward", "skew_reverse",
            "alpha", "hellinger2", "tv", "chi2", or a `Kind`. Default: the blog's.
        beta: generalised Jensen-Shannon divergence in the place of `kind`, in [0, 1]: 0 is forward,
            1 reverse KL. Default: None, `kind` holds.
        rest: what becomes of the mass outside a top-k support: "raw" (left as it is), "renormalise"
            (both models to 1 on the support), "target" (the teacher only), "tail" (one more entry).
            Default: that of arXiv 2603.25562.
        discount: factor per token by which later log-ratios are credited to a token, in [0, 1]; 0
            is immediate credit. Default: the blog's, which found no gain above 0.
        as_credit: whether `kind` is the credit of the drawn token, not a divergence over a support.
            Default: off.
    """
    kind = kind_of(kind) if beta is None else JSD(beta)
    if as_credit or (support == "sampled" and kind == ReverseKL()):
        return sampled(kind, support, k, discount)
    if discount:
        raise ValueError(
            "discount belongs to the sampled policy gradient, not to a backpropagated divergence"
        )
    if support == "sampled":
        support = "full" if k is None else ""
    return Objective(
        Term(Divergence(kind, k, support or None, "raw" if support == "full" else rest))
    )


def sampled(kind: Kind, support: str, k: int | None, discount: float) -> Objective:
    """The policy gradient of the drawn token's credit."""
    if support != "sampled":
        raise ValueError(
            f"as_credit credits the drawn token, and support={support!r} compares others as well: "
            "give one of them"
        )
    if k is not None:
        raise ValueError(
            "k chooses a top-k support: name it, support='teacher', 'student' or 'union'"
        )
    log = kind == ReverseKL()
    if discount and not log:
        raise ValueError(
            f"discount={discount} adds up log-ratios, which make one of the whole response; "
            f"credits of {kind} do not: leave it out, or use f_dpg, which has whole responses"
        )
    credit = LogRatio("teacher", "student") if log else SlopeCredit(kind)
    return Objective(PolicyGradient(ToGo(credit, discount) if discount else credit))
