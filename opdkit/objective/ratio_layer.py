"""The ratio layer: how far a policy gradient trusts its ratio, whatever the credit is and whatever
method it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opdkit.objective.formula import Signal
from opdkit.objective.grammar import Loss, Objective, Term
from opdkit.objective.losses import Bounds, Clipped, PolicyGradient

SETTINGS = ("clip", "dual_clip", "rollout_cap")
NO_RATIO = (
    "clip, dual_clip and rollout_cap belong to the sampled policy gradient, not to a "
    "backpropagated divergence: no term of this objective takes a ratio that they could bound. "
    "Leave them out, or choose a form that is a policy gradient"
)


def apply_layer(objective: Objective, **settings: Any) -> Objective:
    """An objective with the ratio layer's settings in every policy gradient; settings that are not
    given stay as the objective has them.

    Arguments:
        clip: PPO's range of the ratio to the student before the step, (low, high) or one number
            for both: a token whose ratio is beyond 1 - low or 1 + high, on the side to which its
            credit pushes, has no gradient; numbers >= 0. None: no clipping. Default: off, unless
            the method's paper clips; the usual PPO range is (0.2, 0.2).
        dual_clip: bound on the loss of tokens with negative credit, as a multiple of |credit|;
            above 1, needs clip. None: no bound. Default: off; verl has 3.
        rollout_cap: largest weight min(pi_student / pi_sampler, cap) of a token, for a sampler that
            is not exactly the trainer (another engine, other precision, a temperature). Above 0.
            None: the weight has no bound. Default: off; G-OPD's code has 5.
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
    return type(term.loss) is PolicyGradient or isinstance(term.loss, Bounds)


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
    assert isinstance(loss, (PolicyGradient, Bounds))
    if isinstance(loss, Bounds):
        free = type(loss) is not Clipped and math.isinf(loss.low) and math.isinf(loss.high)
        clip, dual = None if free else (loss.low, loss.high), loss.dual
    return {"clip": clip, "dual_clip": dual, "rollout_cap": loss.cap}


def _apply(term: Term, settings: dict[str, Any]) -> Term:
    """A term that takes the layer, with these settings in the place of its own."""
    now = _settings(term)
    wanted = now | settings
    if "clip" in settings and settings["clip"] is None and "dual_clip" not in settings:
        wanted["dual_clip"] = None  # it bounds what is clipped no more
    loss, cap = term.loss, wanted["rollout_cap"]
    if cap is not None and not cap > 0:
        raise ValueError(
            f"rollout_cap={cap!r} must be positive: it is the largest weight of a token, and at 0 "
            "nothing is learnt"
        )
    if wanted["clip"] != now["clip"] or wanted["dual_clip"] != now["dual_clip"]:
        loss = _clipped(loss, _pair(wanted["clip"]), wanted["dual_clip"])
    assert isinstance(loss, (PolicyGradient, Bounds))
    if cap != loss.cap:  # a cap is on what the sampler says, also where the ratio is not
        loss = replace(
            loss, cap=cap, base="sampler" if loss.base in ("student", "live") else loss.base
        )
    return replace(term, loss=loss)


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
        return Clipped(loss.credit, *clip, dual, loss.base, loss.cap)
    if dual is not None:
        raise ValueError("dual_clip bounds a clipped loss: give clip=(low, high) as well")
    return PolicyGradient(loss.credit, loss.base, loss.cap)


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
    loss = PolicyGradient(credit) if base is None else PolicyGradient(credit, base)
    settings = {"clip": clip, "dual_clip": dual_clip, "rollout_cap": rollout_cap}
    return _apply(Term(loss), settings)
