"""ReMix: a clip window around where the step begins, two anchors, and what is left of it where
nothing is replayed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.curricula import MixPolicy
from opdkit.methods.method import load
from opdkit.methods.remix import AnchorShare, Recentred
from opdkit.objective import Clipped, Estimator, Previous, Reward, Snapshot
from opdkit.testing import check, evaluate
from tests.methods.made_up import GROUP, REWARD, MadeUp, advantages, assert_dense
from tests.methods.steps import step as made_step
from tests.methods.toy import logits, numbers, tokens

VARIANTS = [{}, {"beta": 0.0}, {"entropy": 0.01}, {"p": 0.0, "utd": 1}, {"reincarnate": 0}]


def window(credit: float, loss=Recentred, now=0.4, before=0.3, sampler=0.2, **settings):
    """Loss at one token, and its slope in log pi_s."""
    out = evaluate(
        loss(Reward(), 0.2, 0.2, **settings),
        logits((now, 1 - now)),
        tokens(0),
        before_logits=logits((before, 1 - before)),
        sampler_logits=logits((sampler, 1 - sampler)),
        reward=[credit],
    )
    return out.loss.item(), out.grad[0, 0, 0].item() / (1 - now)


def test_the_window_is_around_the_ratio_with_which_the_step_begins():
    """r = 2, c = 1.5: beyond 1.7 a good token gains nothing more, a bad one is still pushed."""
    assert window(1.0) == (pytest.approx(-1.7), 0.0)
    assert window(-1.0) == (pytest.approx(2.0), pytest.approx(2.0))
    # inside it, r A
    assert window(1.0, now=0.32) == (pytest.approx(-1.6), pytest.approx(-1.6))


def test_where_the_step_begins_nothing_is_clipped():
    """r = c: the slope is c A, however far the sampler is."""
    for credit in (1.0, -1.0):
        assert window(credit, now=0.3)[1] == pytest.approx(-1.5 * credit)
    assert window(1.0, now=0.3, sampler=0.01)[1] == pytest.approx(-30.0)
    assert window(1.0, now=0.3, sampler=0.01, cap=4.0)[1] == pytest.approx(-4.0)


def test_dual_clip_bounds_what_is_beyond_the_centre():
    """A = -1, r = 0.9 / 0.2 = 4.5, c = 1.5: at most 3 - (1 - c) where r - c + 1 = 4 is more."""
    assert window(-1.0, now=0.9, dual=3.0) == (pytest.approx(3.5), 0.0)
    assert window(-1.0, now=0.9)[0] == pytest.approx(4.5)


def test_fresh_rollouts_have_the_ordinary_loss_to_the_bit():
    case = made_step(1, fresh=False)
    fresh = {"before_logits": case.before, "sampler_logits": case.before}
    facts = {"reward": case.columns["reward"], "group": GROUP, **fresh}
    a, b = (
        evaluate(method, case.student, case.tokens, case.mask, **facts)
        for method in (load("remix", beta=0.0), load("grpo"))
    )
    assert torch.equal(a.loss, b.loss) and torch.equal(a.grad, b.grad) and a.grad.norm() > 0.01
    # and off the sampler's policy it is another
    off = {**facts, "sampler_logits": case.sampler}
    c = evaluate(load("remix", beta=0.0), case.student, case.tokens, case.mask, **off)
    d = evaluate(load("grpo"), case.student, case.tokens, case.mask, **off)
    assert not torch.allclose(c.grad, d.grad)


@pytest.mark.parametrize(
    ("t", "share"),
    [(0, 1.0), (50, 1.0), (51, 0.9), (60, 0.9), (61, 0.8), (80, 0.7), (100, 0.5), (4000, 0.5)],
)
def test_the_anchors_share(t, share):
    """The weights of both KLs, which add up to beta."""
    models = {"reference": logits((0.5, 0.5)), "previous": logits((0.6, 0.4))}
    out = evaluate(
        load("remix", beta=1.0),
        logits((0.5, 0.5)),
        tokens(0),
        models=models,
        reward=[0.0],
        group=[0],
        step=t,
        total_steps=5000,
    )
    weights = [term.weight.item() for term in out.terms[1:]]
    assert weights == [pytest.approx(share), pytest.approx(1 - share)]


def test_the_convex_sum_of_both():
    """lambda = 0.7, KLs of 0.1 and 0.02: 0.076."""

    def anchor(value: float) -> Tensor:
        """[1, 1, 2]: one with this k3 at a token to which the student gives 1/2."""
        low, high = 0.5, 0.999
        for _ in range(60):
            middle = (low + high) / 2
            u = torch.tensor(2 * middle, dtype=torch.float64)
            low, high = (middle, high) if u - 1 - u.log() < value else (low, middle)
        return logits((low, 1 - low))

    models = {"reference": anchor(0.1), "previous": anchor(0.02)}
    out = evaluate(
        load("remix", beta=1.0),
        logits((0.5, 0.5)),
        tokens(0),
        models=models,
        reward=[0.0],
        group=[0],
        step=80,
        total_steps=100,
    )
    assert [t.value.item() for t in out.terms[1:]] == [pytest.approx(0.07), pytest.approx(0.006)]
    assert out.loss.item() == pytest.approx(0.076)


def test_an_anchor_that_has_just_become_the_student_does_not_pull():
    case = made_step(2, fresh=True, models=("reference", "previous"))
    same = {"reference": case.student, "previous": case.models["previous"]}
    out = evaluate(Estimator("k3", "reference"), case.student, case.tokens, case.mask, models=same)
    assert out.loss == 0 and out.grad.abs().max() == 0


def test_the_previous_iterate_alone_is_mirror_descents_proximal_term():
    """On average over what the student draws, k3 is KL(student || previous)."""
    now, before = (0.2, 0.5, 0.3), (0.5, 0.3, 0.2)
    value = sum(
        p
        * evaluate(
            Estimator("k3", "previous"),
            logits(now),
            tokens(y),
            models={"previous": logits(before)},
        ).loss.item()
        for y, p in enumerate(now)
    )
    p, q = numbers(*now), numbers(*before)
    assert value == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)


def formula(beta: float, share: float, entropy: float = 0.0):
    """r and c of whole distributions; means over each rollout's tokens."""

    def of(m: MadeUp) -> Tensor:
        credit = advantages(std=True)
        r = (m.at("student") - m.at("sampler")).exp()
        c = (m.at("before") - m.at("sampler")).exp()
        bounded = torch.minimum(torch.maximum(r, c - 0.2), c + 0.2)
        total = m.per_row(-torch.minimum(r * credit, bounded * credit))
        for name, weight in (("reference", share), ("previous", 1 - share)):
            d = m.at(name) - m.at("student")
            total = total + beta * weight * m.per_row(d.exp() - d - 1)
        h = -(m["student"].exp() * m["student"]).sum(-1)
        return total - entropy * m.per_row(h)

    return of


@pytest.mark.parametrize(("t", "share"), [(0, 1.0), (55, 0.9), (200, 0.5)])
def test_dense(t, share):
    method = load("remix", beta=0.3, entropy=0.02)
    facts = {"step": t, "total_steps": 300}
    models = ("reference", "previous")
    assert_dense(method, formula(0.3, share, 0.02), models, reward=True, **facts)


def test_without_replay_and_before_the_share_falls_it_is_grpo_with_a_kl():
    case = made_step(4, fresh=False, models=("reference", "previous"))
    facts = {"reward": REWARD, "group": GROUP, "before_logits": case.before}
    facts |= {"sampler_logits": case.before, "models": case.models}
    a, b = (
        evaluate(method, case.student, case.tokens, case.mask, **facts)
        for method in (
            load("remix", p=0.0, utd=1, beta=0.3),
            load("grpo", reference_kl=0.3),
        )
    )
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-15)
    assert load("remix", p=0.0, utd=1).curriculum.recalls is False


def test_what_it_brings():
    made = load("remix", p=0.2, utd=3, window=4, reincarnate=70)
    assert made.curriculum == MixPolicy(0.2, 4, 3, 70)
    assert made.companions == (Snapshot(70), Previous()) and made.opened == frozenset()
    assert load("remix", beta=0.0).companions == ()
    assert load("remix", clip=0.3).objective.terms[0].loss == Recentred(
        load("remix").objective.terms[0].loss.credit, 0.3, 0.3
    )
    assert str(AnchorShare()) in str(made)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_the_checks(variant):
    check(load("remix", **variant))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"p": 1.0}, r"p=1.0 must lie in \[0, 1\)"),
        ({"utd": 0}, "utd=0 must be at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"reincarnate": -1}, "reincarnate=-1 must be at least 0"),
        ({"beta": -1.0}, "must be at least 0"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        load("remix", **arguments)


def test_the_window_of_a_plain_clip_would_be_another():
    assert window(1.0, loss=Clipped)[0] == pytest.approx(-1.8)  # 1.5 min(4/3, 1.2)


@pytest.mark.parametrize("region", [{"divergence_mask": 0.1}, {"smooth": 0.3}])
def test_other_trust_regions_lie_around_the_steps_beginning_already(region):
    """So that replayed rollouts are as they are in grpo: weighed by c."""
    case = made_step(6, fresh=False)
    facts = {"reward": REWARD, "group": GROUP, "before_logits": case.before}
    a, b = (
        evaluate(method, case.student, case.tokens, case.mask, sampler_logits=case.sampler, **facts)
        for method in (
            load("remix", beta=0.0, clip=None, **region),
            load("grpo", clip=None, **region),
        )
    )
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-14)
    assert a.grad.norm() > 0.01
