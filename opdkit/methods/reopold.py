"""Relaxed on-policy distillation."""

from __future__ import annotations

import math

from opdkit.methods.arguments import inside
from opdkit.objective import Early, Entropy, Floor, LogRatio, Objective, PolicyGradient, Quantile


def reopold(
    lam: float = 0.1,
    keep: float = 0.2,
    switch: float = 0.5,
) -> Objective:
    """REOPOLD: the credit gets a floor; floored tokens are dropped early in the run, confident ones
    late.

        credit max(r_t, c),   c = log(lam) / (1 - lam),   mean over the kept tokens
        kept in the first `switch` of the run:   r_t >= c
        kept then:   the `keep` share of highest student entropy (H >= its quantile in the step)

    The floor comes from scoring against the mixture lam pi_s + (1 - lam) pi_t. lam -> 0 lifts it:
    OPD while switch has not come.

    Source: arXiv 2603.11137, which has no public code. Where sources disagree: lam 0.1, 0.2 and 0.3
    occur; the floor is kept in the second phase. Ours: the quantile is interpolated linearly over
    the trained tokens of the step; nothing kept is a loss of zero.

    Arguments:
        lam: the student's share of the mixture that sets the floor c, in (0, 1): 0.1 is a floor of
            -2.56 nats. Default: one of the 0.1, 0.2 and 0.3 that sources have.
        keep: share of the step's tokens that is trained in the second phase, in [0, 1]. Default:
            the paper's.
        switch: share of the run after which the second phase begins, in [0, 1]. Default: the
            paper's, half of the run.
    """
    inside(lam=(lam, "it is the student's share of the mixture that sets the floor"))
    if not 0 <= keep <= 1:
        raise ValueError(
            f"keep={keep} must lie in [0, 1]: it is the share of tokens trained in the second phase"
        )
    credit, entropy = LogRatio("teacher", "student"), Entropy("student")
    floor = math.log(lam) / (1 - lam)
    kept = (Early(switch) & (credit >= floor)) | (
        ~Early(switch) & (entropy >= Quantile(entropy, 1 - keep))
    )
    return Objective((PolicyGradient(Floor(credit, floor)) * kept).per("own"))
