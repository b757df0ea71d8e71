"""On-policy distillation in its standard forms."""

from __future__ import annotations

from opdkit.objective import JSD, Divergence, Kind, LogRatio, Objective, Term, ToGo, policy_gradient

Clip = tuple[float, float] | None


def opd(
    support: str = "sampled",
    k: int | None = None,
    kind: str | Kind = "reverse_kl",
    beta: float | None = None,
    rest: str = "renormalise",
    discount: float = 0.0,
    clip: Clip = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Objective:
    """OPD: the teacher scores every token the student wrote.

        sampled:  -ratio_t r_t,  r_t = log pi_t(y_t) - log pi_s(y_t) before the step;  mean over all
        trained tokens
        else:     the divergence over the support, backpropagated through the student at each prefix

    The sampled form is a policy gradient whose expectation is the gradient of KL(student ||
    teacher) at each prefix; `discount` credits a token with later ones too (1: the gradient of the
    sequence KL; 0: immediate, the default everywhere). `support` "teacher", "student", "union" need
    k; a `kind` other than reverse KL, or `beta` (generalised JSD; 0 forward, 1 reverse), means the
    full vocabulary unless a support is named. `rest` says what becomes of the mass outside a top-k
    support.

    Source: GKD, arXiv 2306.13649; Thinking Machines Lab, "On-Policy Distillation" (2025); top-k
    forms arXiv 2603.25562. Departures: token-mean instead of the blog's sum; the discounted credit
    is masked again after the sum (the blog's code leaves credit on prompt tokens).
    """
    if beta is not None:
        kind = JSD(beta)
    if support == "sampled" and kind == "reverse_kl":
        if k is not None:
            raise ValueError(
                "k chooses a top-k support: name it, support='teacher', 'student' or 'union'"
            )
        credit = LogRatio("teacher", "student")
        return Objective(
            policy_gradient(
                ToGo(credit, discount) if discount else credit, clip, dual_clip, rollout_cap
            )
        )
    if discount or clip or dual_clip or rollout_cap:
        raise ValueError(
            "discount, clip, dual_clip and rollout_cap belong to the sampled policy gradient, not "
            "to a backpropagated divergence"
        )
    if support == "sampled":
        support = "full" if k is None else ""
    return Objective(
        Term(Divergence(kind, k, support or None, "raw" if support == "full" else rest))
    )
