"""Imitation of the teacher on the student's own prefixes."""

from __future__ import annotations

from opdkit.methods.arguments import shares
from opdkit.objective import Divergence, Kind, Objective


def dagger(kind: str | Kind = "forward_kl", k: int | None = None, mix: float = 0.0) -> Objective:
    """DAgger: at every prefix that the student came to, the teacher says what it would have
    written, all of it and not one token.

        (1 - mix) KL(pi_t || pi_s) + mix KL(pi_s || pi_t) on the student's rollouts
        over the whole vocabulary, or over the teacher's top k and one entry for the rest
        mean over all trained tokens

    Its gradient at a prefix is that of cross-entropy with the teacher's distribution as soft
    target. No KL of whole sequences: it is 0 only where the models agree on visited prefixes.

    Source: the on-policy forward corner of arXiv 2605.16826, with dagger(mix=lam) the same as
    `kl_mixing(lam)`; the idea is DAgger's, arXiv 1011.0686. Ours: the token mean, and the top k
    with a tail. Not offered: DAgger's mixture of policies, where the teacher itself takes some of
    the steps (a teacher's prefix is `tropd`'s, a mixed distribution `minillm`'s), and its growing
    data set: rollouts are used once.

    Arguments:
        kind: the divergence that imitates, by name or as a `Kind` (see `opd`). Default: that of
            the corner, supervised learning on the teacher's distribution.
        k: size of the teacher's top k, in tokens, at least 1; None: the whole vocabulary. Default:
            the paper's formula; a k lets a server be the teacher.
        mix: weight of the reverse KL, in [0, 1]; `kind` has the rest. Default: none, the corner
            itself; the paper's lam.
    """
    shares(mix=(mix, "it is the weight of the reverse KL, and the divergence has the rest"))
    support = ("full", "raw") if k is None else ("teacher", "tail")
    parts = ((kind, 1 - mix), ("reverse_kl", mix))
    return Objective(*(Divergence(part, k, *support) * weight for part, weight in parts if weight))
