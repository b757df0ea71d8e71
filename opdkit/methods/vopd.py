"""OPD with a control variate."""

from __future__ import annotations

from opdkit.objective import Gap, LogRatio, Objective, PolicyGradient


def vopd(
    k: int | None = None,
) -> Objective:
    """vOPD: the value of a prefix under OPD's reward is -KL(student || teacher), known in closed
    form: subtract it.

        credit = r_t + KL(pi_s || pi_t)(y_<t) before the step,   mean over all trained tokens
        same expected gradient as OPD;   E[credit] = 0 at each prefix

    `k` takes the baseline over the student's top k, both sides renormalised: still unbiased, since
    it does not depend on the sampled token, and cheaper where the teacher is far away (the paper's
    runs use 100).

    Source: arXiv 2605.07865. The credit's variance never rises; that of the gradient usually, not
    always, falls.

    Arguments:
        k: size of the student's top k that the baseline is taken over, in tokens, at least 1; None:
            the whole vocabulary. Default: the exact value; the paper's runs have 100.
    """
    baseline = Gap("reverse_kl") if k is None else Gap("reverse_kl", "student", k, "renormalise")
    return Objective(PolicyGradient(LogRatio("teacher", "student") + baseline))
