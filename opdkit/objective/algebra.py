"""The algebra of objectives: the weight of one, one times a weight or a number.

Weights are signals, expressions that are [B, T], [B, 1] or [1, 1] once a step is known; nothing is
computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import mul

from opdkit.base.errors import UserError
from opdkit.objective.formula import Const, Number, Signal, factors
from opdkit.objective.grammar import Objective, RolloutLoss
from opdkit.objective.losses import Clipped
from opdkit.objective.needs import per_rollout
from opdkit.objective.signals import Where

SAME_WEIGHT_TWICE = (
    "{name} already carries the weight of {source}: twice the same mask says nothing new, twice "
    "the same weight is its square. Leave one of them out"
)


def weight(objective: Objective, name: str) -> Signal:
    """The weight of a method: what its loss is multiplied by, which can multiply another method's
    loss as well.

    One term: its weight. Several: the factors that all of them have; where they have none in common
    but divide the rollouts among themselves (SCOPE: right and wrong ones), each rollout's weight in
    its own term.
    """
    terms = objective.terms
    inside = [factors(term.weights) for term in terms]
    shared = [f for f in inside[0] if all(f in others for others in inside[1:])]
    if len(terms) == 1 and shared:
        found = terms[0].weights
    elif shared:
        found = reduce(lambda a, b: a * b, shared)
    elif _divide_rollouts(inside):
        found = reduce(lambda a, b: a + b, (term.weights for term in terms))
    else:
        why = "its loss is not multiplied by any signal"
        if len(terms) > 1 and any(inside):
            why = "its terms are weighted each in its own way, which chooses between losses"
        raise UserError(
            f"{name} has no weight to multiply another method by: {why}. Weights come from methods "
            f"such as iw_opd, tip, paced, drift_gating, position_opd and scope; add {name} with + "
            "instead"
        )
    if any(isinstance(t.loss, Clipped) or getattr(t.loss, "cap", None) for t in terms):
        raise UserError(
            f"{name} gives bounds of a ratio (clip, rollout_cap, divergence_mask ...), which "
            "belong to its own loss, and only its weight is taken: give them to the method on the "
            "left, or leave them out"
        )
    return found


def _divide_rollouts(inside: Sequence[tuple[Signal, ...]]) -> bool:
    """Whether every two terms look at different rollouts: one has a signal per rollout and the
    other its opposite.
    """

    def opposite(a: tuple[Signal, ...], b: tuple[Signal, ...]) -> bool:
        return any(~f in b and per_rollout(f) for f in a)

    pairs = [(a, b) for i, a in enumerate(inside) for b in inside[:i]]
    return bool(pairs) and all(opposite(a, b) or opposite(b, a) for a, b in pairs)


def weigh(objective: Objective, name: str, by: Signal, source: str) -> Objective:
    """Every term of `objective` times the signal `by` of `source`; what it selects and counts
    stays as it is.

    A weight of tokens says something of those that the student drew; what others wrote keeps the
    weight that the method on the left gives it, times what is said of whole rollouts.
    """
    for term in objective.terms:
        if isinstance(term.loss, RolloutLoss) and not per_rollout(by):
            raise UserError(
                f"{name} has a loss over whole rollouts ({term.loss}), which has no value per "
                f"token that {source} could weigh: use a weight per rollout (paced, scope), or a "
                "loss over tokens"
            )
        if set(factors(by)) & set(factors(term.weights)):
            raise UserError(SAME_WEIGHT_TWICE.format(name=name, source=source))
    try:
        own = weight(objective, name)
    except UserError:
        own = Const(1)
    if own == by:
        raise UserError(SAME_WEIGHT_TWICE.format(name=name, source=source))
    whole = [f for f in factors(by) if per_rollout(f)]
    drawn = by if whole == list(factors(by)) else Where("student", by, reduce(mul, whole, Const(1)))
    alone = all(term.whose == ("student",) for term in objective.terms)
    return objective * (by if alone else drawn)


def scale(objective: Objective, number: Number) -> Objective:
    """A multiple of every term."""
    if not 0 < number < float("inf"):
        raise UserError(
            f"a method times {number:g}: a method can be multiplied by a positive number only. 0 "
            "trains nothing, and a negative number drives the student away from what the method "
            "teaches. Give a number above 0"
        )
    return objective * number


def within(objective: Objective, limit: int) -> Objective:
    """An objective in a run whose responses have at most `limit` tokens."""
    return Objective(*(t.per(limit) if t.denominator == "limit" else t for t in objective.terms))
