"""On-policy distillation in its standard forms."""

from __future__ import annotations

from opdkit.objective import JSD, Divergence, Kind, LogRatio, Objective, PolicyGradient, Term, ToGo


def opd(
    support: str = "sampled",
    k: int | None = None,
    kind: str | Kind = "reverse_kl",
    beta: float | None = None,
    rest: str = "renormalise",
    discount: float = 0.0,
) -> Objective:
    """OPD: the teacher scores every token the student wrote.

        sampled:  -ratio_t r_t,   r_t = log pi_t(y_t) - log pi_s(y_t) before the step
        else:     the divergence over the support, backpropagated through the student at each prefix
        mean over all trained tokens

    The sampled form is a policy gradient whose expectation is the gradient of KL(student ||
    teacher) at each prefix; `discount` credits a token with later ones too (1: the gradient of the
    sequence KL; 0: immediate, the default everywhere). `support` "teacher", "student", "union" need
    k; a `kind` other than reverse KL, or `beta` (generalised JSD; 0 forward, 1 reverse), means the
    full vocabulary unless a support is named.

    Source: GKD, arXiv 2306.13649; Thinking Machines Lab, "On-Policy Distillation" (2025); top-k
    forms arXiv 2603.25562. Departures: token-mean instead of the blog's sum; the discounted credit
    is masked again after the sum (the blog's code leaves credit on prompt tokens).

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
    """
    if beta is not None:
        kind = JSD(beta)
    if support == "sampled" and kind == "reverse_kl":
        if k is not None:
            raise ValueError(
                "k chooses a top-k support: name it, support='teacher', 'student' or 'union'"
            )
        credit = LogRatio("teacher", "student")
        return Objective(PolicyGradient(ToGo(credit, discount) if discount else credit))
    if discount:
        raise ValueError(
            "discount belongs to the sampled policy gradient, not to a backpropagated divergence"
        )
    if support == "sampled":
        support = "full" if k is None else ""
    return Objective(
        Term(Divergence(kind, k, support or None, "raw" if support == "full" else rest))
    )
