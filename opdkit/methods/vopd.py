"""OPD with a control variate."""

from __future__ import annotations

from opdkit.methods.opd import Clip
from opdkit.objective import Gap, LogRatio, Objective, policy_gradient


def vopd(
    k: int | None = None,
    clip: Clip = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Objective:
    """vOPD: the value of a prefix under OPD's reward is -KL(student || teacher), known in closed
    form: subtract it.

        credit = r_t + KL(pi_s || pi_t)(y_<t),  before the step; same expected gradient as OPD,
        E[credit] = 0 at each prefix

    `k` takes the baseline over the student's top k, both sides renormalised: still unbiased, since
    it does not depend on the sampled token, and cheaper where the teacher is far away (the paper's
    runs use 100).

    Source: arXiv 2605.07865. The credit's variance never rises; that of the gradient usually, not
    always, falls.
    """
    baseline = Gap("reverse_kl") if k is None else Gap("reverse_kl", "student", k, "renormalise")
    return Objective(
        policy_gradient(LogRatio("teacher", "student") + baseline, clip, dual_clip, rollout_cap)
    )
