"""Top-k OPD: values and gradients of the card; the bias of the naive form and its absence in the
others.
"""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
from tests.methods.toy import close, expected, logits, numbers, reverse_kl_gradient, tokens

P_S, P_T = (0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4)
S, T = logits(P_S), {"teacher": logits(P_T)}
GRAD_MASS = (0.12, 0.09, -0.14, -0.07)  # gradient of the student's mass on S = {0, 1}: the bias


@pytest.mark.parametrize(
    ("mode", "value", "gradient"),
    [
        ("notail", 0.676157, (0.404055, 0.008792, -0.275231, -0.137616)),
        ("notail_sg", 0.676157, (0.284055, -0.081208, -0.135231, -0.067616)),
        ("tail", 0.421968, (0.385731, -0.004951, -0.253853, -0.126927)),
    ],
)
def test_two_of_four(mode, value, gradient):
    out = evaluate(load("topk_opd", mode=mode, k=2), S, tokens(3), models=T)
    assert close(out.loss, value) and close(out.grad[0, 0], gradient)


def test_renormalised_on_both():
    out = evaluate(load("opd", support="student", k=2), S, tokens(0), models=T)
    assert close(out.loss, 0.118641) and close(out.grad[0, 0], (0.240203, -0.240203, 0, 0))
    # names the same two: the intersection is S, and sg changes nothing
    alike = {"teacher": logits((0.3, 0.4, 0.1, 0.2))}
    ours = evaluate(load("topk_opd", mode="intersect_sg_norm", k=2), S, tokens(0), models=alike)
    plain = evaluate(load("opd", support="student", k=2), S, tokens(0), models=alike)
    assert (
        close(ours.loss, plain.loss.item(), 12)
        and close(ours.grad, plain.grad, 12)
        and plain.loss > 0.01
    )


def test_intersection():
    method = load("topk_opd", mode="intersect_sg_norm", k=3)
    out = evaluate(method, S, tokens(0), models=T)
    assert close(out.loss, 0.081093) and close(out.grad[0, 0], (0, 0.194623, -0.194623, 0))
    one = evaluate(
        load("topk_opd", mode="intersect_sg_norm", k=2),
        S,
        tokens(0),
        models={"teacher": logits((0.4, 0.2, 0.3, 0.1))},
    )
    assert one.loss == 0 and (one.grad == 0).all()


def test_models_that_do_not_meet_count_in_the_denominator():
    student, teacher = logits(P_S, P_S), {"teacher": logits(P_T, (0.2, 0.4, 0.3, 0.1))}
    method = load("topk_opd", mode="intersect_sg_norm", k=2)  # {0, 1} and {3, 2}; {0, 1} and {1, 2}
    out = evaluate(method, student, tokens(0, 0), models=teacher)
    assert (
        out.loss == 0 and out.grad.isfinite().all() and out.terms[0].denominator.tolist() == [[2]]
    )


@pytest.mark.parametrize("mode", ["notail", "notail_sg", "tail", "intersect_sg_norm"])
def test_agreement_is_zero_but_for_the_bias_of_the_naive_form(mode):
    out = evaluate(load("topk_opd", mode=mode, k=2), S, tokens(0), models={"teacher": S})
    assert close(out.loss, 0.0, 12)
    assert close(out.grad[0, 0], GRAD_MASS if mode == "notail" else (0, 0, 0, 0), 12)


@pytest.mark.parametrize("mode", ["notail", "notail_sg", "tail", "intersect_sg_norm"])
def test_the_whole_vocabulary_has_the_gradient_of_reverse_kl(mode):
    gradient = expected(load("topk_opd", mode=mode, k=4), P_S, P_T)
    assert close(gradient, (0.371944, -0.015291, -0.172380, -0.184273)) and close(
        gradient, reverse_kl_gradient(P_S, P_T), 12
    )


def test_single_tokens_weighted_by_their_inverse_probability_add_up_to_reverse_kl():
    total = torch.zeros(4, dtype=torch.float64)
    for v, (p, q) in enumerate(zip(P_S, P_T)):
        # S = {v}, chosen before the step
        chose = torch.full((4,), 0.01).index_fill(0, torch.tensor(v), 0.97).tolist()
        out = evaluate(load("topk_opd", k=1), S, tokens(0), models=T, before_logits=logits(chose))
        slope = p * (torch.eye(4, dtype=torch.float64)[v] - numbers(*P_S))  # grad p_s(v)
        assert close(out.grad[0, 0], numbers(p / q).log() * slope, 12)
        total += p * out.grad[0, 0] / p
    assert close(total, reverse_kl_gradient(P_S, P_T), 12)


def test_the_fixed_form_is_no_divergence():
    low = {"teacher": logits((0.49, 0.49, 0.01, 0.01))}
    assert evaluate(load("topk_opd", k=2), S, tokens(0), models=low).loss < 0
    assert evaluate(load("topk_opd", k=2, mode="tail"), S, tokens(0), models=low).loss > 0


def test_mean_over_tokens_then_over_rollouts():
    student, teacher = (
        logits(P_S, P_S).expand(2, -1, -1),
        {"teacher": logits(P_T, P_S).expand(2, -1, -1)},
    )
    mask = torch.tensor([[True, False], [True, True]])
    out = evaluate(
        load("topk_opd", k=2), student, torch.zeros(2, 2, dtype=torch.int64), mask, models=teacher
    )
    assert close(out.loss, (0.676157 + 0.676157 / 2) / 2)


@pytest.mark.parametrize("mode", ["notail", "notail_sg", "tail", "intersect_sg_norm"])
def test_check(mode):
    check(load("topk_opd", mode=mode))


def test_a_mode_that_cannot_learn_is_unknown():
    with pytest.raises(UserError, match="notail_sg"):
        load("topk_opd", mode="token_reverse_kl")
