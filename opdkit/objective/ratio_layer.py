"""The ratio layer: how far a policy gradient trusts its ratio, whatever the credit is and whatever
method it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from opdkit.objective.algebra import TRAINER_OVER_SAMPLER, factors, is_cap
from opdkit.objective.grammar import Const, Loss, Objective, Operation, RolloutLoss, Signal, Term
from opdkit.objective.losses import Bounds, Clipped, PolicyGradient
from opdkit.objective.signals import Ceiling, Mark

SETTINGS = ("clip", "dual_clip", "rollout_cap")
NO_RATIO = (
    "clip, dual_clip and rollout_cap belong to the sampled policy gradient, not to a "
    "backpropagated divergence: no term of this objective takes a ratio that they could bound. "
    "Leave them out, or choose a form that is a policy gradient"
)


def apply_layer(objective: Objective, **settings: Any) -> Objective:
    """An objective with the ratio layer's settings in every policy gradient; settings that are not
    given stay as the objective has them.

    Terms on guided tokens are left as they are: no sampler drew these tokens, so their ratio to it
    is no measure of trust.

    Arguments:
        clip: PPO's range of the ratio, (low, high) or one number for both: a token whose ratio is
            beyond 1 - low or 1 + high, on the side to which its credit pushes, has no gradient;
            numbers >= 0. None: no clipping. Default: off, unless the method's paper clips; the
            usual PPO range is (0.2, 0.2).
        dual_clip: bound on the loss of tokens with negative credit, as a multiple of |credit|;
            above 1, needs clip. None: no bound. Default: off; verl has 3.
        rollout_cap: largest weight min(pi_student / pi_sampler, cap) of a token, for a sampler that
            is not exactly the trainer (another engine, other precision); ratios are then taken to
            the student before the step, as the trainer computes it. Above 0. None: no weight, and
            ratios to the sampler. Default: off; G-OPD's code has 5.
    """
    if not any(map(takes_layer, objective.terms)):
        if any(value is not None for value in settings.values()):
            raise ValueError(NO_RATIO)
        return objective
    return Objective(
        *(_apply(term, settings) if takes_layer(term) else term for term in objective.terms)
    )


def takes_layer(term: Term) -> bool:
    """Whether a term takes a ratio to what a sampler drew, in one of the forms known here."""
    known = type(term.loss) is PolicyGradient or isinstance(term.loss, Bounds)
    return known and Mark("guided") not in factors(term.weight)


def settings_of(objective: Objective) -> dict[str, Any]:
    """The layer's settings as they stand in an objective, those left out in which its terms differ;
    empty where no term takes them.
    """
    found = [_settings(term) for term in objective.terms if takes_layer(term)]
    return {
        name: found[0][name]
        for name in SETTINGS
        if found and all(other[name] == found[0][name] for other in found)
    }


def _settings(term: Term) -> dict[str, Any]:
    """The layer's settings as they stand in one term."""
    loss, clip, dual = term.loss, None, None
    if isinstance(loss, Bounds):
        free = type(loss) is not Clipped and math.isinf(loss.low) and math.isinf(loss.high)
        clip, dual = None if free else (loss.low, loss.high), loss.dual
    caps = [f.at for f in factors(term.weight) if isinstance(f, Ceiling) and is_cap(f)]
    return {"clip": clip, "dual_clip": dual, "rollout_cap": caps[0] if caps else None}


def _apply(term: Term, settings: dict[str, Any]) -> Term:
    """A term that takes the layer, with these settings in the place of its own."""
    now = _settings(term)
    wanted = now | settings
    if "clip" in settings and settings["clip"] is None and "dual_clip" not in settings:
        wanted["dual_clip"] = None  # it bounds what is clipped no more
    if wanted["clip"] != now["clip"] or wanted["dual_clip"] != now["dual_clip"]:
        term = replace(term, loss=_clipped(term.loss, _pair(wanted["clip"]), wanted["dual_clip"]))
    if wanted["rollout_cap"] != now["rollout_cap"]:
        term = _capped(term, wanted["rollout_cap"])
    return term


def _pair(clip: Any) -> tuple[float, float] | None:
    """(low, high), from a pair or from one number for both."""
    if clip is None:
        return None
    pair = (clip, clip) if isinstance(clip, (int, float)) else clip
    if (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and x >= 0 for x in pair)
    ):
        return pair[0], pair[1]
    raise ValueError(
        f"clip={clip!r} must be (low, high), two numbers of at least 0 such as (0.2, 0.28), or one "
        "number for both: the ratio is clipped to 1 - low .. 1 + high"
    )


def _clipped(loss: Loss, clip: tuple[float, float] | None, dual: float | None) -> Loss:
    """The loss with these bounds in the place of its own."""
    assert isinstance(loss, (PolicyGradient, Bounds))
    if isinstance(loss, Bounds) and (clip is not None or type(loss) is not Clipped):
        low, high = clip or (math.inf, math.inf)
        return replace(loss, low=low, high=high, dual=dual)
    if clip is not None:
        return Clipped(loss.credit, *clip, dual, loss.base)
    if dual is not None:
        raise ValueError("dual_clip bounds a clipped loss: give clip=(low, high) as well")
    return PolicyGradient(loss.credit, loss.base)


def _capped(term: Term, cap: float | None) -> Term:
    """The term with this cap in the place of its own: as the first factor of its weight, and in
    what its ratio is taken to.
    """
    assert isinstance(term.loss, (PolicyGradient, Bounds))
    old, new = ("student", "sampler") if cap is None else ("sampler", "student")
    weight = _without_cap(term.weight)
    if cap is not None:
        _, first = against(cap, isinstance(term.loss, RolloutLoss))
        weight = _in_front(first, weight)
    return replace(
        term, loss=replace(term.loss, base=_renamed(term.loss.base, old, new)), weight=weight
    )


def against(rollout_cap: float | None, whole: bool = False) -> tuple[str, Signal]:
    """What a ratio is to, and the weight of its loss: the sampler and 1.

    With `rollout_cap` the ratio is to the student before this step, and what the trainer and the
    sampler disagree about is a weight min(pi_student / pi_sampler, cap) without gradient, of each
    token or, `whole`, of each rollout.
    """
    if rollout_cap is None:
        return "sampler", Const(1)
    return "student", Ceiling(TRAINER_OVER_SAMPLER[whole], rollout_cap)


def _without_cap(weight: Signal) -> Signal:
    """A product without the factor that caps it."""
    if is_cap(weight):
        return Const(1)
    if not any(map(is_cap, factors(weight))):
        return weight
    assert isinstance(weight, Operation)
    left, right = weight.of
    if is_cap(left) or is_cap(right):
        return _without_cap(right if is_cap(left) else left)
    return _without_cap(left) * _without_cap(right)


def _in_front(first: Signal, weight: Signal) -> Signal:
    """first * weight, multiplied from left to right."""
    if weight == Const(1):
        return first
    if isinstance(weight, Operation) and weight.name == "*":
        return _in_front(first, weight.of[0]) * weight.of[1]
    return first * weight


def _renamed(base: str | Signal, old: str, new: str) -> str | Signal:
    """What a ratio is taken to, with one model in the place of another."""
    if isinstance(base, str):
        return new if base == old else base
    part: Any = base
    return replace(part, **{f.name: new for f in fields(part) if getattr(part, f.name) == old})


def policy_gradient(
    credit: Signal,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
    base: str | Signal | None = None,
) -> Term:
    """The policy gradient of a credit with the ratio layer's settings (see `apply_layer`), its
    ratio to `base` where that is given.
    """
    term = _apply(
        Term(PolicyGradient(credit)),
        {"clip": clip, "dual_clip": dual_clip, "rollout_cap": rollout_cap},
    )
    loss: Any = term.loss
    return term if base is None else replace(term, loss=replace(loss, base=base))
