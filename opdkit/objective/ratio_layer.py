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
from opdkit.objective.regions import DivergenceMask, Region, Smooth

REGIONS = ("clip", "divergence_mask", "smooth")  # at most one of them holds the ratio
OF = {"dual_clip": "clip", "mask_kind": "divergence_mask"}  # what belongs to one of them
NUMBERS = ("dual_clip", "rollout_cap", "divergence_mask", "smooth")  # each of them, or None
SETTINGS = ("clip", "dual_clip", "rollout_cap", "divergence_mask", "mask_kind", "smooth")
NO_RATIO = (
    f"{', '.join(SETTINGS[:-1])} and {SETTINGS[-1]} belong to the sampled policy gradient, not to "
    "a backpropagated divergence: no term of this objective takes a ratio that they could bound. "
    "Leave them out, or choose a form that is a policy gradient"
)


def apply_layer(objective: Objective, **settings: Any) -> Objective:
    """An objective with the ratio layer's settings in every policy gradient; settings that are not
    given stay as the objective has them. `clip`, `divergence_mask` and `smooth` are three ways to
    hold the ratio: one that is given takes the place of another that the objective has.

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
        divergence_mask: DPPO's trust region (arXiv 2602.04879) in the place of a clip: a token has
            no gradient where the student is at least this far from itself before the step and its
            credit pushes it further away; a step back is never blocked. At least 0, a probability
            or nats by `mask_kind`; at the first update on rollouts nothing is blocked, as the two
            are the same. Blocked tokens are counted. None: no mask. Default: off; public
            recipes have 0.1 to 0.2 for "tv", 0.05 for "kl".
        mask_kind: how the mask measures: "tv" |pi - pi_before| of the token, "kl" KL(pi_before ||
            pi) of the token against all others together, "full_tv" and "full_kl" the same over the
            whole vocabulary (one more pass of the student). None: "tv". Default: DPPO's simplest.
        smooth: DRPO's eps, above 0, in the place of a clip: -A r + |A| pi_before (r - 1)^2 / (2
            eps), so that a token's weight falls as 1 - sign(A (r - 1)) |pi - pi_before| / eps,
            beyond eps to less than nothing. None: off. Default: off; its recipe has 12.5.
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
    loss, found = term.loss, dict.fromkeys(SETTINGS)
    assert isinstance(loss, (PolicyGradient, Bounds))
    found["rollout_cap"] = loss.cap
    if isinstance(loss, Bounds):
        free = type(loss) is not Clipped and math.isinf(loss.low) and math.isinf(loss.high)
        if loss.region is None:
            found |= {"clip": None if free else (loss.low, loss.high), "dual_clip": loss.dual}
        if isinstance(loss.region, DivergenceMask):
            found |= {"divergence_mask": loss.region.delta, "mask_kind": loss.region.kind}
        if isinstance(loss.region, Smooth):
            found["smooth"] = loss.region.eps
    return found


def _apply(term: Term, settings: dict[str, Any]) -> Term:
    """A term that takes the layer, with these settings in the place of its own."""
    now = _settings(term)
    wanted = _joined(now, settings)
    loss, cap = term.loss, wanted["rollout_cap"]
    if cap is not None and (isinstance(cap, bool) or not cap > 0):
        raise ValueError(
            f"rollout_cap={cap!r} must be positive: it is the largest weight of a token, and at 0 "
            "nothing is learnt"
        )
    if any(wanted[name] != now[name] for name in (*REGIONS, *OF)):
        loss = _bounded(loss, _pair(wanted["clip"]), wanted["dual_clip"], _region(wanted))
    assert isinstance(loss, (PolicyGradient, Bounds))
    if cap != loss.cap:  # a cap is on what the sampler says, also where the ratio is not
        loss = replace(
            loss, cap=cap, base="sampler" if loss.base in ("student", "live") else loss.base
        )
    return replace(term, loss=loss)


def _joined(now: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A term's settings and others that take their place: one way to hold the ratio drives out the
    one that the term has, and what belongs to a way goes with it.
    """
    given = [name for name in REGIONS if settings.get(name) is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are {len(given)} ways to hold the same ratio, and what one "
            "lets pass the other would block: give one of them"
        )
    wanted = now | (dict.fromkeys(REGIONS) if given else {}) | settings
    for name, of in OF.items():
        if wanted[of] is None and wanted[name] is not None:
            if settings.get(name) is not None:
                raise ValueError(
                    f"{name} belongs to {of}, and there is none: give {of}= as well"
                    + (f" (clip=(low, high)), or leave {name} out" if of == "clip" else "")
                )
            wanted[name] = None  # it bounds what is there no more
    return wanted


def _region(wanted: dict[str, Any]) -> Region | None:
    """What holds the ratio in the place of a clip."""
    if wanted["divergence_mask"] is not None:
        return DivergenceMask(wanted["divergence_mask"], wanted["mask_kind"] or "tv")
    return None if wanted["smooth"] is None else Smooth(wanted["smooth"])


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


def _bounded(
    loss: Loss, clip: tuple[float, float] | None, dual: float | None, region: Region | None
) -> Loss:
    """The loss with these bounds in the place of its own."""
    assert isinstance(loss, (PolicyGradient, Bounds))
    low, high = clip or (math.inf, math.inf)
    bounds: dict[str, Any] = {"low": low, "high": high, "dual": dual, "region": region}
    if isinstance(loss, Bounds) and type(loss) is not Clipped:
        return replace(loss, **bounds)
    if clip is region is None:
        return PolicyGradient(loss.credit, loss.base, loss.cap)
    return Clipped(loss.credit, low, high, dual, loss.base, loss.cap, region)


def policy_gradient(
    credit: Signal,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
    base: str | Signal | None = None,
    **settings: Any,
) -> Term:
    """The policy gradient of a credit with the ratio layer's settings (see `apply_layer`), its
    ratio to `base` where that is given.
    """
    loss = PolicyGradient(credit) if base is None else PolicyGradient(credit, base)
    settings |= {"clip": clip, "dual_clip": dual_clip, "rollout_cap": rollout_cap}
    return _apply(Term(loss), settings)
