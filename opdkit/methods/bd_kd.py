"""Balanced divergences: both directions of the KL, weighed by which model is surer of itself."""

from __future__ import annotations

import math

from opdkit.objective import Divergence, Entropy, Objective


def bd_kd(delta: float = 3.0) -> Objective:
    """BD-KD: forward and reverse KL at every token, and more of the one that closes the gap between
    the two entropies.

        w_F KL(pi_t || pi_s) + w_R KL(pi_s || pi_t),   mean over all trained tokens
        w_F = delta where H(pi_t) > H(pi_s), else 1     too sure a student covers the teacher
        w_R = delta where H(pi_s) > H(pi_t), else 1     too flat a student seeks its mode

    Entropies are in nats over the whole vocabulary and are those before the step: constants, also
    for several updates on the same rollouts. delta 1 is the symmetric KL. Loss and gradient are 0
    where the models agree.

    Source: arXiv 2212.12965; which direction weighs more follows its port to language models
    (ghwang-s/ABKD). Departures: from that port, F is the divergence and not the cross-entropy (the
    same gradient), and the student writes the text. Not offered: the paper's temperature and the
    weight of its labels, which were not found, and its teacher that learns as well.

    Arguments:
        delta: weight of the direction that closes the gap of entropies, against 1 for the other; at
            least 1. Default: the port's code; its comments say 2.
    """
    if not 1 <= delta < math.inf:
        raise ValueError(
            f"delta={delta} must be a number of at least 1: below it the direction that widens the "
            "gap between the entropies would weigh more"
        )
    student, teacher = Entropy("student"), Entropy("teacher")
    forward = Divergence("forward_kl") * (1 + (delta - 1) * (teacher > student))
    return forward + Divergence("reverse_kl") * (1 + (delta - 1) * (student > teacher))
