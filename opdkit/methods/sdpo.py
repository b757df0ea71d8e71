"""Self-distilled policy optimisation: the student that knows what came of an attempt teaches the
one that made it.
"""

from __future__ import annotations

from typing import Any

from opdkit.methods.arguments import itself, one_of, positive, shares
from opdkit.methods.method import Method
from opdkit.objective import (
    JSD,
    Divergence,
    LogRatio,
    Mark,
    Objective,
    RatioWeighted,
    Reinforce,
    TokenLoss,
)

VIEW = "peer_or_feedback"


def sdpo(
    alpha: float = 0.5,
    k: int = 100,
    cap_ratio: float = 2.0,
    rest: str = "tail",
    teacher: str = "ema",
    rate: float = 0.05,
    support: str = "top",
) -> Method:
    """SDPO: the student re-scores its own attempt after it has read a successful one, or why its
    own failed, and learns from the difference.

        D_t = (1 - alpha) KL(pi_s || M) + alpha KL(pi_t || M), M = (1 - alpha) pi_s + alpha pi_t
              alpha 0: KL(pi_t || pi_s), 1: KL(pi_s || pi_t)
              over the student's top k and one more entry for all the rest
        rho = min(pi_s / pi_sampler, cap_ratio), the student as it is now, no gradient
        rho D_t, mean over the trained tokens of informed rollouts

        pi_t = an average of the student under prompt + another rollout of the group that
               succeeded, else + the feedback on this one

    A rollout with neither carries the mark `uninformed`: no loss, and not counted. The top k are
    the student's before the step. "sampled" is rho times -r_t log pi_s(y_t), r_t = log pi_t(y_t) -
    log pi_s(y_t) before the step: in expectation the gradient of alpha = 1. Reward and advantage
    are in no loss; they only say which rollout is shown.

    Source: arXiv 2601.20802 and its code. Departures: the ratio is to the sampler, the code's to
    the policy before the step; the student's tail is at least 1e-8, where the code has both at
    least 1e-7. Not offered: its Renyi divergences, further rollout-correction weights.

    Arguments:
        alpha: where the divergence lies between forward (0) and reverse KL (1), in [0, 1]. Default:
            the paper's, the symmetric one.
        k: size of the student's top k with support="top", in tokens, at least 1. Default: the
            paper's.
        cap_ratio: largest weight of a token that the student now finds likelier than the sampler
            did, above 0; infinity: no bound. Default: the paper's.
        rest: mass outside the top k: one more entry ("tail"), or both to 1 on the k
            ("renormalise"). Default: the paper's, which never exceeds the full divergence.
        teacher: weights of the teacher: "ema" (a moving average of the student's), or
            "trust_region" (logits (1 - rate) of the student at the start + rate of it now).
            Default: the paper's.
        rate: share of the way that the average moves to the student at every optimiser step, or
            the share of the student in the trust region, in [0, 1]. Default: the paper's.
        support: "top" (the student's k), "full" (the whole vocabulary) or "sampled" (the token
            drawn, by policy gradient; needs alpha=1). Default: the paper's.
    """
    shares(
        alpha=(alpha, "0 is forward KL, 1 reverse KL"),
        rate=(rate, "it is the share of the student that the teacher takes over"),
    )
    positive(cap_ratio=(cap_ratio, "it is the largest weight of a token"))
    loss = RatioWeighted(compared(alpha, k, rest, support), "sampler", cap_ratio)
    informed = (loss * ~Mark("uninformed")).per("own")
    return Method(Objective(informed), models={"teacher": knowing(teacher, rate)})


def compared(alpha: float, k: int, rest: str, support: str) -> TokenLoss:
    """What is compared at each token."""
    one_of(support=(support, ("top", "full", "sampled")), rest=(rest, ("tail", "renormalise")))
    if support == "top":
        return Divergence(JSD(alpha), k, "student", rest)
    if support == "full":
        return Divergence(JSD(alpha))
    if alpha != 1:
        raise ValueError(
            f"support='sampled' with alpha={alpha}: the token that the student drew shows reverse "
            "KL alone. Use alpha=1, or another support"
        )
    return Reinforce(LogRatio("teacher", "student"))


def knowing(teacher: str, rate: float) -> dict[str, Any]:
    """The teacher, in the words of a run."""
    one_of(teacher=(teacher, ("ema", "trust_region")))
    if teacher == "ema":
        return itself(VIEW, "ema", rate=rate)
    own = {"start": "fixed", "now": "live"}
    return {
        "kind": "mixture",
        "form": "geometric",
        "of": {name: {"kind": "self", "weights": weights} for name, weights in own.items()},
        "weights": {"start": 1 - rate, "now": rate},
        "view": VIEW,
    }
