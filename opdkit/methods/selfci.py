"""SelfCI: two teachers, each the student with one kind of feedback."""

from __future__ import annotations

from functools import reduce
from operator import add

from opdkit.methods.arguments import one_of
from opdkit.methods.method import Method
from opdkit.objective import (
    Const,
    Divergence,
    Floor,
    LogRatio,
    Loss,
    Objective,
    PolicyGradient,
    Row,
    Signal,
)

# what says how well a rollout already does what a teacher is there for, in [0, 1]
COLUMNS = {"allowed": "utility", "disallowed": "integrity"}


def selfci(
    w_allowed: float = 1.0,
    w_disallowed: float = 1.0,
    adaptive: bool = False,
    support: str = "full",
    k: int = 50,
) -> Method:
    """SelfCI: one teacher knows what may be shared, another what may not; the student is drawn to
    their product.

        l_t = (w_a KL(pi_s || pi_a) + w_d KL(pi_s || pi_d)) / max(w_a + w_d, 1)   at each prefix
        mean over each rollout's tokens, then over rollouts

    pi_a and pi_d are the initial student in the views `allowed` and `disallowed`. With w_a + w_d
    >= 1 the target is q = pi_a^v pi_d^(1 - v) / Z, v = w_a / (w_a + w_d): l_t = KL(pi_s || q) -
    log Z. A weight of 0 loads no model for it. `adaptive` multiplies w_a by 1 - utility and w_d by
    1 - integrity of a rollout, columns in [0, 1]: what it does well already is not taught.

    `support` "top": both sides renormalised on the student's top k; "sampled": the policy gradient
    of the log-ratios of the token that was drawn.

    Source: arXiv 2605.20258 and its code. Departure: the code differentiates the sampled log-ratio
    itself, whose gradient is zero on average whatever the teachers say; here the log-ratio is a
    credit. Not offered: teachers interpolated with the student (averaged weights are
    `models.allowed.weights=ema`).

    Arguments:
        w_allowed: w_a: weight of the teacher that knows what may be shared, at least 0. Default:
            the code's; its README has 0.5, which is the same loss.
        w_disallowed: w_d: weight of the teacher that knows what may not, at least 0. Default: the
            code's; its README has 0.5.
        adaptive: whether the weights are scaled by what a rollout still lacks, from the numeric
            columns `utility` and `integrity`. Default: the code's, off.
        support: where models are compared: "full", "top" or "sampled". Default: the code's.
        k: size of the student's top k with support="top", in tokens, at least 1. Default: the
            code's.
    """
    one_of(support=(support, ("full", "top", "sampled")))
    if min(w_allowed, w_disallowed) < 0 or w_allowed + w_disallowed == 0:
        raise ValueError(
            f"w_allowed={w_allowed}, w_disallowed={w_disallowed} must be at least 0 and not both "
            "0: they are the weights of the two teachers, and without one nothing is taught"
        )
    given = {"allowed": w_allowed, "disallowed": w_disallowed}
    weights = {name: weight for name, weight in given.items() if weight}
    terms = [
        (_distance(name, support, k) * share).per("rows")
        for name, share in (lacking(weights) if adaptive else fixed(weights)).items()
    ]
    models = {name: {"kind": "self", "weights": "fixed", "view": name} for name in weights}
    return Method(Objective(*terms), models=models)


def fixed(weights: dict[str, float]) -> dict[str, Signal]:
    """Each teacher's weight over their sum, or over 1 where that is less."""
    total = max(sum(weights.values()), 1)
    return {name: Const(weight / total) for name, weight in weights.items()}


def lacking(weights: dict[str, float]) -> dict[str, Signal]:
    """The same of weights that are scaled by what a rollout still lacks, [B, 1] each."""
    scaled = {name: (1 - Row(COLUMNS[name])) * weight for name, weight in weights.items()}
    total = Floor(reduce(add, scaled.values()), 1)
    return {name: weight / total for name, weight in scaled.items()}


def _distance(teacher: str, support: str, k: int) -> Loss:
    """The reverse KL to a teacher."""
    if support == "sampled":
        return PolicyGradient(LogRatio(teacher, "student"))
    if support == "top":
        return Divergence("reverse_kl", k, "student", "renormalise", teacher=teacher)
    return Divergence("reverse_kl", teacher=teacher)
