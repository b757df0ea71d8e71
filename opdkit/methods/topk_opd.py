"""Reverse KL on the student's top k, with its gradient's bias removed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opdkit.methods.arguments import one_of
from opdkit.objective import Divergence, Kind, Objective, ReverseKL


@dataclass(frozen=True)
class FixedRatioKL(Kind):
    """The value of KL(student || teacher), differentiated through p_s but not through the
    log-ratio: sum_v p_s sg(log p_s - log p_t).

    Entries [..., K] from log-probs of student and teacher [..., K].
    """

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return ls.exp() * (ls.detach() - lt)


def topk_opd(mode: str = "notail_sg", k: int = 20) -> Objective:
    """Top-k OPD: on part of the vocabulary the reverse KL, differentiated as it stands, pushes mass
    out of that part; one detach stops it.

        S = the student's top k before the step, p of the whole vocabulary
        mean over each rollout's tokens, then over rollouts

        notail:             sum_S p_s (log p_s - log p_t)
                            its gradient has sum_S grad p_s too much, also where pi_s = pi_t
        notail_sg:          sum_S p_s (sg(log p_s) - log p_t)
                            no bias; with S = V the gradient of the full reverse KL
        tail:               notail with all that lies outside S as one more entry on each side
        intersect_sg_norm:  notail_sg on S and the teacher's top k, both renormalised there;
                            0 where they do not meet

    The values of notail and notail_sg can be negative.

    Source: arXiv 2605.11182. Departures: the released code also floors the teacher's tail at 1e-8,
    which is mass it never gave (only the student's is floored here). Not offered: its
    token_reverse_kl as a loss, whose gradient does not see the teacher (`opd` is the sampled form
    that learns); the penalty inside a task advantage; cross-entropy on a share of teacher-written
    rollouts; dropping long ones.

    Arguments:
        mode: which of the four. Default: the paper's remedy, "notail_sg".
        k: size of the student's top k, in tokens, at least 1. Default: the paper's; it also has 1,
            5 and 50.
    """
    modes = {
        "notail_sg": (FixedRatioKL(), "student", "raw"),
        "notail": (ReverseKL(), "student", "raw"),
        "tail": (ReverseKL(), "student", "tail"),
        "intersect_sg_norm": (FixedRatioKL(), "intersection", "renormalise"),
    }
    one_of(mode=(mode, modes))
    kind, support, rest = modes[mode]
    return Objective(Divergence(kind, k, support, rest).per("rows"))
