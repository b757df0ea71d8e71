"""The ratio layer: what it makes of a finished objective, and what it leaves as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from opdkit.methods.grpo import SequenceClipped
from opdkit.methods.minillm import LogMixture
from opdkit.objective import (
    Advantage,
    Clipped,
    Divergence,
    Entropy,
    Likelihood,
    LogRatio,
    Mark,
    Objective,
    PolicyGradient,
    policy_gradient,
)
from opdkit.objective.losses import Outer
from opdkit.objective.ratio_layer import NO_RATIO, SETTINGS, apply_layer, settings_of

CREDIT = LogRatio("teacher", "student")
PLAIN = Objective(PolicyGradient(CREDIT))
OFF = dict.fromkeys(SETTINGS)


def test_a_policy_gradient_gets_bounds_and_gives_them_back():
    made = apply_layer(PLAIN, clip=(0.1, 0.2), dual_clip=3.0)
    assert made == Objective(Clipped(CREDIT, 0.1, 0.2, 3.0))
    assert settings_of(made) == OFF | {"clip": (0.1, 0.2), "dual_clip": 3.0}
    assert apply_layer(made, clip=None) == PLAIN == apply_layer(PLAIN) and settings_of(PLAIN) == OFF
    assert apply_layer(made, dual_clip=2.0) == Objective(Clipped(CREDIT, 0.1, 0.2, 2.0))
    assert apply_layer(PLAIN, clip=0.2) == apply_layer(PLAIN, clip=(0.2, 0.2))


def test_a_cap_is_the_losss_own_and_its_weight_the_trainer_over_the_sampler():
    a = Entropy("teacher")
    made = apply_layer(Objective(PolicyGradient(CREDIT) * a * 2), rollout_cap=5)
    assert made == Objective(PolicyGradient(CREDIT, cap=5) * a * 2)
    assert made.terms[0].loss.outer == Outer("sampler", 5)
    assert apply_layer(made, rollout_cap=2) == Objective(PolicyGradient(CREDIT, cap=2) * a * 2)
    assert apply_layer(made, rollout_cap=None) == Objective(PolicyGradient(CREDIT) * a * 2)
    assert apply_layer(PLAIN, rollout_cap=5, clip=0.2) == Objective(Clipped(CREDIT, cap=5))
    for bad in (0, -1.0, True):
        with pytest.raises(ValueError, match="must be positive"):
            apply_layer(PLAIN, rollout_cap=bad)


def test_one_ratio_per_rollout_has_a_weight_per_rollout():
    made = apply_layer(Objective(SequenceClipped(Advantage()).per("rows")), rollout_cap=1.2)
    assert made == Objective(SequenceClipped(Advantage(), cap=1.2).per("rows"))
    assert made.terms[0].loss.outer == Outer("sampler", 1.2, whole=True)
    assert settings_of(made)["rollout_cap"] == 1.2
    loose = apply_layer(made, clip=None).terms[0].loss
    assert (loose.low, loose.high) == (math.inf, math.inf)


def test_a_cap_is_on_what_the_tokens_were_drawn_from():
    """With a ratio to the student before the step, that is still the sampler."""
    mixed = LogMixture("teacher", "sampler", 0.2)
    for base, drawn_from in ((mixed, mixed), ("reference", "reference"), ("student", "sampler")):
        loss = apply_layer(Objective(PolicyGradient(CREDIT, base)), rollout_cap=5).terms[0].loss
        assert loss.base == drawn_from


def test_other_terms_stay():
    others = Objective(Divergence() * 0.5, Likelihood() * Mark("guided"))
    made = apply_layer(PLAIN + others, clip=(0.2, 0.2), rollout_cap=5)
    assert made.terms[1:] == others.terms and isinstance(made.terms[0].loss, Clipped)
    assert settings_of(others) == {}


@dataclass(frozen=True)
class Doubled(PolicyGradient):
    """A policy gradient of one's own."""

    def value(self, live):
        return 2 * super().value(live)


@dataclass(frozen=True)
class Halved(Clipped):
    """A clipped one of one's own."""

    size: float = 0.5

    def value(self, live):
        return self.size * super().value(live)


def test_losses_of_ones_own_are_bounded_only_where_they_have_bounds():
    """A subclass would lose what makes it one if another loss took its place."""
    with pytest.raises(ValueError, match="Leave them out"):
        apply_layer(Objective(Doubled(CREDIT)), clip=(0.2, 0.2))
    made = apply_layer(Objective(Halved(CREDIT, size=0.3)), clip=(0.1, 0.2), dual_clip=3)
    assert made == Objective(Halved(CREDIT, 0.1, 0.2, 3, size=0.3))
    assert apply_layer(made, clip=None) == Objective(
        Halved(CREDIT, math.inf, math.inf, None, size=0.3)
    )


def test_settings_in_which_terms_differ_are_no_settings_of_the_whole():
    both = PLAIN + Objective(Clipped(CREDIT, 0.1, 0.1))
    assert settings_of(both) == {name: None for name in SETTINGS if name != "clip"}
    assert settings_of(apply_layer(both, clip=(0.3, 0.3)))["clip"] == (0.3, 0.3)


def test_refusals():
    with pytest.raises(ValueError, match="no term of this objective takes a ratio"):
        apply_layer(Objective(Divergence()), rollout_cap=5)
    assert "Leave them out" in NO_RATIO
    assert apply_layer(Objective(Divergence()), **OFF) == Objective(Divergence())
    for wrong in ((0.2,), (0.1, 0.2, 0.3), "wide", -0.1, (0.2, -0.2), True):
        with pytest.raises(ValueError, match=r"must be \(low, high\)"):
            apply_layer(PLAIN, clip=wrong)
    with pytest.raises(ValueError, match="give clip="):
        apply_layer(PLAIN, dual_clip=3.0)
    with pytest.raises(ValueError, match="give clip="):
        apply_layer(Objective(Clipped(CREDIT)), clip=None, dual_clip=3.0)


def test_policy_gradient_of_a_credit():
    plain, clip = policy_gradient(CREDIT), policy_gradient(CREDIT, (0.1, 0.2), 3.0)
    assert plain.loss == PolicyGradient(CREDIT) and clip.loss == Clipped(CREDIT, 0.1, 0.2, 3.0)
    capped = policy_gradient(CREDIT, rollout_cap=5)
    assert capped == PolicyGradient(CREDIT, cap=5).per("tokens")
    assert policy_gradient(CREDIT, base="reference").loss == PolicyGradient(CREDIT, "reference")
    with pytest.raises(ValueError, match="give clip="):
        policy_gradient(CREDIT, dual_clip=3.0)
