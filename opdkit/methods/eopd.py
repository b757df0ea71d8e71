"""Entropy-aware on-policy distillation."""

from __future__ import annotations

from opdkit.methods.opd import Clip
from opdkit.objective import Divergence, Entropy, LogRatio, Objective, policy_gradient


def eopd(
    alpha: float = 1.0,
    tau: float = 0.8,
    k: int = 16,
    rest: str = "target",
    clip: Clip = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Objective:
    """EOPD: where the teacher itself is unsure, forward KL is added, so that reverse KL does not
    collapse good continuations to one.

        -ratio r_t  +  alpha [H(pi_t) >= tau] KL(p~_t || pi_s),  p~_t = pi_t renormalised on its top
        k;  both over all trained tokens

    H is in nats, over the whole vocabulary. The reverse part stays on every token; tau = inf or
    alpha = 0 is OPD. `rest` "target" leaves pi_s normalised over the whole vocabulary, as the
    official recipe does; "renormalise", the code's own default, puts no pressure on the student to
    move mass into the teacher's k. With k short of the vocabulary the forward part is -log(mass of
    the k) and has a gradient even where student and teacher agree.

    Source: arXiv 2603.07079. Departures: PPO's layer is off (the paper's is `clip=(0.2, 0.2)`, four
    updates per rollout batch). Not offered: the switch or convex mix of the two directions, by
    which summaries describe it, against paper and code.
    """
    forward = Divergence("forward_kl", k, "teacher", rest)
    reverse = policy_gradient(LogRatio("teacher", "student"), clip, dual_clip, rollout_cap)
    return reverse + forward * (Entropy("teacher") >= tau) * alpha
