"""BD-KD: the card's numbers, which direction weighs more, and that the weights are constants."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective import Objective
from opdkit.testing import check, evaluate
from tests.methods.made_up import MadeUp, assert_dense
from tests.methods.steps import step
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens

SHARP, FLAT = (0.8, 0.1, 0.1), (0.5, 0.3, 0.2)


def on(student, teacher, **arguments):
    method = load("bd_kd", **arguments)
    return evaluate(method, logits(student), tokens(0), models={"teacher": logits(teacher)})


def weights(out):
    """Of forward and reverse KL at the first token."""
    return [term.weight[0, 0].item() for term in out.terms]


def kl(a, b):
    p, q = numbers(*a), numbers(*b)
    return (p * (p / q).log()).sum().item()


def test_the_entropies_and_divergences_of_the_card():
    for p, nats in ((SHARP, 0.639032), (FLAT, 1.029653)):
        assert close(-(numbers(*p) * numbers(*p).log()).sum(), nats)
    assert kl(FLAT, SHARP) == pytest.approx(0.233211, abs=5e-7)
    assert kl(SHARP, FLAT) == pytest.approx(0.196827, abs=5e-7)


@pytest.mark.parametrize(("delta", "loss"), [(1.0, 0.430038), (2.0, 0.663250), (3.0, 0.896461)])
def test_too_sure_a_student_covers_the_teacher(delta, loss):
    """delta F + R = delta 0.233211 + 0.196827."""
    out = on(SHARP, FLAT, delta=delta)
    assert close(out.loss, loss) and weights(out) == [delta, 1]


def test_too_flat_a_student_seeks_the_mode():
    """The roles exchanged, F' = 0.196827 and R' = 0.233211: F' + 2 R'."""
    out = on(FLAT, SHARP, delta=2.0)
    assert close(out.loss, 0.663250) and weights(out) == [1, 2]


def test_at_delta_1_it_is_the_symmetric_kl():
    assert close(on(P_S, P_T, delta=1.0).loss, kl(P_T, P_S) + kl(P_S, P_T), 12)


def test_models_that_agree_have_no_loss_and_both_weights_are_1():
    out = on(P_S, P_S)
    assert weights(out) == [1, 1] and out.loss == 0 and (out.grad == 0).all()


def test_models_that_differ_and_are_equally_sure_have_both_weights_1():
    out = on((0.5, 0.25, 0.25), (0.25, 0.5, 0.25))
    assert weights(out) == [1, 1] and out.loss > 0


def test_one_weight_alone_differs_from_1_at_every_token():
    case = step(2, fresh=False)
    forward, reverse = (t.weight[case.mask] for t in case.run(load("bd_kd").objective).terms)
    assert bool(((forward == 1) ^ (reverse == 1)).all())
    assert 0 < (forward == 3).sum() < len(forward)


def test_the_weights_are_constants():
    """The gradient is that of 3 F + R with the 3 held: p - q times 3, and R's p (l - R)."""
    p, q = numbers(*SHARP), numbers(*FLAT)
    l = (p / q).log()
    assert close(on(SHARP, FLAT).grad[0, 0], 3 * (p - q) + p * (l - (p * l).sum()), 12)


def test_the_weights_stay_those_before_the_step():
    """Twice the same rollouts: a student that has since become the flatter one is still taught as
    the sharper one that it was.
    """
    out = evaluate(
        load("bd_kd"),
        logits((0.34, 0.33, 0.33)),
        tokens(0),
        models={"teacher": logits(FLAT)},
        before_logits=logits(SHARP),
    )
    assert weights(out) == [3, 1]


@pytest.mark.parametrize("delta", [1.0, 2.5])
def test_the_naive_form(delta):
    def formula(d: MadeUp) -> torch.Tensor:  # []
        s, t, before = d["student"], d["teacher"], d["before"]
        forward, reverse = (t.exp() * (t - s)).sum(-1), (s.exp() * (s - t)).sum(-1)
        gap = (before.exp() * before).sum(-1) - (t.exp() * t).sum(-1)  # H_t - H_s
        w_f, w_r = torch.where(gap > 0, delta, 1.0), torch.where(gap < 0, delta, 1.0)
        return d.per_token(w_f * forward + w_r * reverse)

    assert_dense(load("bd_kd", delta=delta), formula)


def test_a_masked_token_has_no_gradient():
    case = step(0, fresh=True)
    out = case.run(load("bd_kd").objective)
    assert (out.grad[~case.mask] == 0).all() and (out.grad[case.mask].abs().amax(-1) > 0).all()


def test_a_token_that_the_teacher_rules_out_leaves_it_finite():
    out = on((0.6, 0.3, 0.1), (0.7, 0.3, 0.0))
    assert out.loss.isfinite() and out.grad.isfinite().all()


def test_check():
    check(load("bd_kd"))
    check(load("bd_kd", delta=1.0))


def test_its_terms_share_no_weight_that_could_multiply_another_method():
    with pytest.raises(UserError, match="weighted each in its own way"):
        load("opd") * load("bd_kd")
    assert isinstance((load("bd_kd") * load("tip")).objective, Objective)


def test_half_the_tokens_by_another_methods_weight_are_half_the_loss():
    """Positions count as they do without it: all trained tokens."""
    case = step(1, fresh=True)
    half = case.run((load("bd_kd") * load("position_opd", share=0.5)).objective)
    whole = case.run(load("bd_kd").objective)
    kept = half.grad.abs().sum(-1) > 0
    assert torch.allclose(half.grad[kept], whole.grad[kept]) and 0 < kept.sum() < case.mask.sum()


@pytest.mark.parametrize(
    ("delta", "words"), [(0.5, "at least 1"), (math.nan, "is no number"), (math.inf, "at least 1")]
)
def test_bad_arguments_are_explained(delta, words):
    with pytest.raises(UserError, match=words):
        load("bd_kd", delta=delta)


def test_off_policy_rollouts_are_weighed_like_fresh_ones():
    """No ratio: who wrote the tokens does not matter to a divergence at their prefixes."""
    case = step(4, fresh=False)
    other = replace(case, sampler=case.student)
    a, b = (c.run(load("bd_kd").objective) for c in (case, other))
    assert torch.equal(a.grad, b.grad)
