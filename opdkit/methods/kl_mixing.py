"""Forward and reverse KL mixed, on prefixes of the student or of the teacher."""

from __future__ import annotations

from opdkit.curricula import Mixed
from opdkit.methods.method import Method
from opdkit.objective import Divergence


def kl_mixing(lam: float = 0.25, prefix: str = "student") -> Method:
    """KL mixing: whose prefixes and which KL are independent choices; mostly forward KL keeps
    entropy and length in check.

        lam KL(pi_s || pi_t) + (1 - lam) KL(pi_t || pi_s) over the whole vocabulary at each prefix
        mean over all trained tokens

    `prefix` "student": the student's rollouts; "teacher": responses of the data set (the teacher's
    own, where it wrote them). lam 0 with teacher prefixes is off-policy distillation, lam 1 with
    student prefixes OPD; only these two add up to a KL of whole sequences.

    Source: arXiv 2605.16826, no public code. lam and the token mean are ours: the paper asks for
    more forward than reverse at long lengths. Not offered: a mixture of prefix sources inside one
    step (batches alternate in `gkd(lmbda=...)`). Its length curriculum is a setting of the run:
    curriculum=entropy_length.

    Arguments:
        lam: share of the reverse KL, in [0, 1]; the rest is forward KL. Default: ours; the paper
            asks for more forward than reverse at long lengths.
        prefix: whose prefixes: "student" (its rollouts) or "teacher" (responses of the data).
            Default: the student's, on which the paper studies mixtures.
    """
    if not 0 <= lam <= 1:
        raise ValueError(
            f"lam={lam} must lie in [0, 1]: it weights the reverse KL, 1 - lam the forward KL"
        )
    if prefix not in ("student", "teacher"):
        raise ValueError(
            f"prefix={prefix!r} must be 'student' or 'teacher': who writes the responses"
        )
    objective = Divergence("reverse_kl") * lam + Divergence("forward_kl") * (1 - lam)
    return Method(objective, curriculum=Mixed(1.0 if prefix == "student" else 0.0))
