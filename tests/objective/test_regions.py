"""Trust regions in the place of a clip: DPPO's mask and DRPO's smooth form, for every loss that
takes a ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods import METHODS
from opdkit.methods.method import load, spelled
from opdkit.objective import (
    Bounds,
    Clipped,
    Objective,
    PolicyGradient,
    Row,
    TokenLoss,
    clipped,
    ratio,
)
from opdkit.objective.ratio_layer import SETTINGS, apply_layer, settings_of
from opdkit.objective.regions import MASK_KINDS, DivergenceMask, Smooth
from opdkit.testing import check
from tests.methods.ragged import on, slopes
from tests.methods.steps import GROUPS, advantages, agrees, at, step
from tests.methods.toy import close, numbers

MU, PI, A = (0.01, 0.5, 0.5), (0.03, 0.6, 0.45), (1.0, 1.0, -1.0)
OFF = dict.fromkeys(SETTINGS)
PLAIN = Objective(PolicyGradient(Row("a")))


def moved(pi=PI, mu=MU, credit=A, **settings):
    """A policy that has moved from mu to pi at tokens with these credits: the loss, and of each
    token the weight that it pushes with, -d loss / d log pi_s / (A r).
    """
    now, before = ([[math.log(p)] for p in each] for each in (pi, mu))
    out = on(apply_layer(PLAIN, **settings), now, before=before, rows={"a": numbers(*credit)})
    r = numbers(*pi) / numbers(*mu)
    return out.loss.item(), -len(pi) * slopes(out, now) / (numbers(*credit) * r)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"divergence_mask": 0.08}, [1, 0, 1]),  # TV .02, .1, .05: only the second is far enough
        ({"divergence_mask": 0.04}, [1, 0, 0]),
        ({"divergence_mask": 0.01}, [0, 0, 0]),
        ({"divergence_mask": math.inf}, [1, 1, 1]),
        ({"divergence_mask": 0}, [0, 0, 0]),
        # KL of (mu, 1 - mu) to (pi, 1 - pi): .00906, .02041, .00503
        ({"divergence_mask": 0.02, "mask_kind": "kl"}, [1, 0, 1]),
        ({"divergence_mask": 0.009, "mask_kind": "kl"}, [0, 0, 1]),
    ],
)
def test_which_tokens_a_mask_drops(settings, kept):
    """Dropped tokens are 0 in the loss and stay in its denominator."""
    loss, weights = moved(**settings)
    assert close(weights, kept, 12)
    each = (3.0, 1.2, -0.9)  # A r
    assert close(numbers(loss)[0], -sum(k * x for k, x in zip(kept, each)) / 3, 12)


def test_two_point_divergences_by_hand():
    mask = DivergenceMask(0.0, "kl")
    now, before = (numbers(*p).log() for p in (PI, MU))
    by_hand = [m * math.log(m / p) + (1 - m) * math.log((1 - m) / (1 - p)) for m, p in zip(MU, PI)]
    assert close(mask.of_token(now, before), by_hand, 12)
    sure = torch.tensor([0.0, -1e-30]).double()  # probability 1 before and now: nothing apart
    assert (mask.of_token(sure, sure) == 0).all()


@pytest.mark.parametrize(("second", "kept"), [(0.599, 1), (0.601, 0)])
def test_a_clip_looks_at_the_ratio(second, kept):
    """PPO at 0.2 drops the rare token that has moved by 0.02 and, beside its bound 1.2, decides on
    the common one by a hair; the mask drops that one on either side.
    """
    pi = (0.03, second, 0.45)
    assert close(moved(pi, clip=0.2)[1], [0, kept, 1], 12)
    assert close(moved(pi, divergence_mask=0.08)[1], [1, 0, 1], 12)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_steps_back_are_never_blocked(kind):
    """However far the student is: A > 0 where it has become less probable, A < 0 where more."""
    pi, mu, credit = (0.01, 0.99, 0.5), (0.9, 0.1, 0.5), (1.0, -1.0, 1.0)
    assert close(moved(pi, mu, credit, divergence_mask=0, mask_kind=kind)[1], [1, 1, 1], 12)
    away = tuple(-a for a in credit)  # the third has not moved: r = 1 is neither
    assert close(moved(pi, mu, away, divergence_mask=0, mask_kind=kind)[1], [0, 0, 1], 12)


@pytest.mark.parametrize("settings", [{"divergence_mask": 1e-6}, {"smooth": 0.01}])
def test_the_first_update_is_the_plain_policy_gradient(settings):
    loss, weights = moved(MU, **settings)
    assert close(weights, [1, 1, 1], 12) and close(numbers(loss)[0], -sum(A) / 3, 12)


def test_smooth_weights():
    """1 - sign(A (r - 1)) |pi - mu| / eps: .02, .1 away and .05 away; back it is more than one."""
    assert close(moved(smooth=0.1)[1], [0.8, 0.0, 0.5], 12)
    assert close(moved(smooth=0.05)[1], [0.6, -1.0, 0.0], 12)
    assert close(moved(credit=(-1.0, -1.0, 1.0), smooth=0.1)[1], [1.2, 2.0, 1.5], 12)
    loss, weights = moved(smooth=1e12)
    assert close(weights, [1, 1, 1], 9) and close(numbers(loss)[0], -3.3 / 3, 9)
    # -A r + |A| mu (r - 1)^2 / (2 eps): .01 * 4, .5 * .04, .5 * .01 over 2 eps
    assert close(numbers(moved(smooth=0.5)[0])[0], (-3.3 + 0.04 + 0.02 + 0.005) / 3, 12)


def pushed(case, settings, ls, said, r=None, around="before"):
    """[B, T]: -A r under a region, and on what it is off: written out on whole log-probs."""
    y = case.tokens
    a = advantages(case.columns["reward"], GROUPS, std=True)[:, None].expand(y.shape)
    p, mu = at(ls, y).exp(), at(said[around], y).exp()
    r = p / mu if r is None else r
    if "smooth" in settings:
        return -a * r + a.abs() * mu * (p / mu - 1).square() / (2 * settings["smooth"])
    full, mine = said[around].exp(), ls.exp()
    apart = {
        "tv": (p - mu).abs(),
        "kl": mu * (mu / p).log() + (1 - mu) * ((1 - mu) / (1 - p)).log(),
        "full_tv": (full - mine).abs().sum(-1) / 2,
        "full_kl": (full * (said[around] - ls)).sum(-1),
    }[settings.get("mask_kind", "tv")]
    dropped = (apart >= settings["divergence_mask"]) & (a * (p - mu) > 0)
    return torch.where(dropped, 0.0, -a * r)


REGIONS = [{"smooth": 0.1}, {"divergence_mask": 0.02}]
REGIONS += [{"divergence_mask": 0.02, "mask_kind": kind} for kind in ("kl", "full_tv", "full_kl")]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("settings", REGIONS, ids=str)
@pytest.mark.parametrize("loss", ["grpo", "dapo", "cispo"])
def test_token_losses_are_the_naive_formula(loss, settings, fresh):
    case = step(3, fresh)

    def reference(ls, said):
        y, mask = case.tokens, case.mask
        outer = (at(said["before"], y) - at(said["sampler"], y)).exp()
        each = torch.where(mask, pushed(case, settings, ls, said) * outer, 0.0)
        return (each.sum(1) / mask.sum(1)).mean() if loss == "grpo" else each.sum() / mask.sum()

    assert agrees(load("grpo", loss=loss, **settings), case, reference)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("settings", REGIONS[:3], ids=str)
def test_a_ratio_per_rollout_sees_geometric_means(settings, fresh):
    case = step(4, fresh)

    def reference(ls, said):
        y, mask = case.tokens, case.mask
        means = {
            name: torch.where(mask, at(x, y), 0.0).sum(1) / mask.sum(1)
            for name, x in (("live", ls), *said.items())
        }
        a = advantages(case.columns["reward"], GROUPS, std=True)
        p, mu = means["live"].exp(), means["before"].exp()
        r, outer = p / mu, (means["before"] - means["sampler"]).exp()
        if "smooth" in settings:
            each = -a * r + a.abs() * mu * (r - 1).square() / (2 * settings["smooth"])
        else:
            kl = mu * (mu / p).log() + (1 - mu) * ((1 - mu) / (1 - p)).log()
            apart = kl if "mask_kind" in settings else (p - mu).abs()
            each = torch.where((apart >= 0.02) & (a * (p - mu) > 0), 0.0, -a * r)
        return (each * outer).mean()

    assert agrees(load("grpo", loss="gspo", **settings), case, reference)


@pytest.mark.parametrize("settings", REGIONS, ids=str)
def test_a_ratio_with_a_teacher_in_it_is_held_to_the_student(settings):
    """RLAD's ratio is one thing, how far the student has moved another."""
    case = step(5, False)

    def reference(ls, said):
        y, mask = case.tokens, case.mask
        log_r = 0.5 * (at(ls, y) - at(said["before"], y))
        log_r = log_r + 0.5 * (at(ls, y) - at(said["teacher"], y)).clamp(-1, 1)
        outer = (at(said["before"], y) - at(said["sampler"], y)).exp()
        each = pushed(case, settings, ls, said, log_r.exp()) * outer
        return torch.where(mask, each, 0.0).sum() / mask.sum()

    assert agrees(load("rlad", **settings), case, reference)


def test_masks_block_something_in_these_steps():
    """Else the references above would not say that they do."""
    case = step(3, False)
    plain = case.run(load("grpo", clip=None).objective).grad
    for settings in REGIONS:
        assert (case.run(load("grpo", **settings).objective).grad - plain).norm() > 1e-3


# -------------------------------------------------------------------------------------- as settings

OWN_WAY = {"alp"}  # one ratio of what no two policies say of a token
TAKES = [name for name in METHODS if "smooth" in dict(load(name).arguments) and name not in OWN_WAY]


@pytest.mark.parametrize("name", TAKES)
def test_every_method_with_a_ratio_takes_them(name):
    """In the place of its clip, if it has one; off again, it is without either."""
    usual = dict(load(name).arguments)
    for given in ({"divergence_mask": 0.08}, {"smooth": 0.3}):
        made = load(name, **given)
        said = usual | OFF | {"rollout_cap": usual["rollout_cap"]} | given
        if "divergence_mask" in given:
            said["mask_kind"] = "tv"
        assert dict(made.arguments) == said
        assert load(name, **said) == made == load(name, **dict(made.arguments))
        assert load(spelled(made)).objective == made.objective
        assert not check(made).failed
        assert load(name, **said | OFF).objective == load(name, **OFF).objective


@pytest.mark.parametrize("kind", ["kl", "full_tv", "full_kl"])
@pytest.mark.parametrize("name", ["opd", "grpo", "rlad"])
def test_check_of_other_masks(name, kind):
    made = load(name, divergence_mask=0.05, mask_kind=kind)
    assert not check(made).failed
    assert made.needs.whole("student") == kind.startswith("full")


def test_one_way_takes_the_place_of_another():
    clip = apply_layer(PLAIN, clip=(0.1, 0.2), dual_clip=3.0)
    mask = apply_layer(clip, divergence_mask=0.1, mask_kind="kl")
    assert settings_of(mask) == OFF | {"divergence_mask": 0.1, "mask_kind": "kl"}
    assert mask == apply_layer(PLAIN, divergence_mask=0.1, mask_kind="kl")
    assert settings_of(apply_layer(mask, mask_kind="full_kl"))["divergence_mask"] == 0.1
    assert settings_of(apply_layer(mask, divergence_mask=0.2))["mask_kind"] == "kl"
    smooth = apply_layer(mask, smooth=0.5)
    assert settings_of(smooth) == OFF | {"smooth": 0.5} and smooth.terms[0].loss.region == Smooth(
        0.5
    )
    assert apply_layer(smooth, clip=(0.1, 0.2), dual_clip=3.0) == clip
    assert apply_layer(smooth, smooth=None) == PLAIN == apply_layer(mask, divergence_mask=None)
    capped = apply_layer(mask, rollout_cap=2.0)
    assert capped.terms[0].loss.cap == 2.0 and settings_of(capped)["divergence_mask"] == 0.1


@dataclass(frozen=True)
class Mine(Bounds, TokenLoss):
    """Bounds of one's own, whose value knows of no region."""

    def value(self, live):
        return clipped(ratio(live, "student"), live.pick(self.credit), self.low, self.high)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("grpo", {"clip": 0.2, "divergence_mask": 0.1}, "clip and divergence_mask are 2 ways"),
        ("grpo", {"smooth": 0.2, "divergence_mask": 0.1}, "divergence_mask and smooth are 2"),
        ("grpo", {"mask_kind": "kl"}, "mask_kind belongs to divergence_mask, and there is none"),
        ("grpo", {"smooth": 1.0, "mask_kind": "kl"}, "mask_kind belongs to divergence_mask"),
        ("grpo", {"divergence_mask": 0.1, "dual_clip": 3.0}, "dual_clip belongs to clip"),
        ("grpo", {"divergence_mask": -0.1}, "must be a number of at least 0"),
        ("grpo", {"divergence_mask": math.nan}, "divergence_mask=nan is no number"),
        ("grpo", {"divergence_mask": "wide"}, "must be null or float, not 'wide'"),
        ("grpo", {"divergence_mask": 0.1, "mask_kind": "js"}, "one of tv, kl, full_tv, full_kl"),
        ("grpo", {"smooth": 0}, "must be a positive number"),
        ("grpo(loss=gspo)", {"divergence_mask": 0.1, "mask_kind": "full_kl"}, "whole rollouts"),
        ("erpd", {"divergence_mask": 0.1, "mask_kind": "full_tv"}, "tokens of sampler"),
        ("pi_distill(offpolicy=topr)", {"smooth": 0.1}, "in a way of its own"),
        ("gkd", {"divergence_mask": 0.1}, "no term of this objective takes a ratio"),
    ],
)
def test_refusals(name, settings, words):
    with pytest.raises(UserError, match=words):
        name, _, own = name.partition("(")
        own = dict([own.strip(")").split("=")]) if own else {}
        load(name, **own, **settings)


def test_bounds_of_ones_own_that_know_of_no_region_refuse_one():
    with pytest.raises(ValueError, match="Mine bounds its ratio in a way of its own"):
        apply_layer(Objective(Mine(Row("a"))), smooth=0.5)
    with pytest.raises(ValueError, match="give one of the three"):
        Clipped(Row("a"), region=DivergenceMask(0.1))  # the clip is there by default


def test_it_prints_what_it_is():
    shown = str(load("grpo", divergence_mask=0.08))
    assert "low=inf, high=inf, region=DivergenceMask(delta=0.08, kind='tv')" in shown
