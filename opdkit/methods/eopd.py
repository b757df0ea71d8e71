"""Entropy-aware on-policy distillation."""

from __future__ import annotations

from opdkit.objective import Divergence, Entropy, LogRatio, Objective, PolicyGradient


def eopd(
    alpha: float = 1.0,
    tau: float = 0.8,
    k: int = 16,
    rest: str = "target",
) -> Objective:
    """EOPD: where the teacher itself is unsure, forward KL is added, so that reverse KL does not
    collapse good continuations to one.

        -ratio r_t  +  alpha [H(pi_t) >= tau] KL(p~_t || pi_s),   both over all trained tokens
        p~_t = pi_t renormalised on its top k

    H is in nats, over the whole vocabulary. The reverse part stays on every token; tau = inf or
    alpha = 0 is OPD. `rest` "target" leaves pi_s normalised over the whole vocabulary, as the
    official recipe does; "renormalise", the code's own default, puts no pressure on the student to
    move mass into the teacher's k. With k short of the vocabulary the forward part is -log(mass of
    the k) and has a gradient even where student and teacher agree.

    Source: arXiv 2603.07079. Departures: PPO's layer is off (the paper's is `clip=(0.2, 0.2)`, four
    updates per rollout batch). Not offered: the switch or convex mix of the two directions, by
    which summaries describe it, against paper and code.

    Arguments:
        alpha: weight of the forward KL, at least 0; 0 is OPD. Default: the paper's.
        tau: least teacher entropy, in nats, at which forward KL is added; inf is OPD. Default: the
            paper's.
        k: size of the teacher's top k in the forward KL, in tokens, at least 1. Default: the
            paper's.
        rest: mass outside the top k: "target" (the teacher renormalised, the student not),
            "renormalise" (both), "raw", "tail" (see `opd`). Default: the official recipe's; the
            code's own is "renormalise".
    """
    forward = Divergence("forward_kl", k, "teacher", rest)
    reverse = PolicyGradient(LogRatio("teacher", "student"))
    return reverse + forward * (Entropy("teacher") >= tau) * alpha
