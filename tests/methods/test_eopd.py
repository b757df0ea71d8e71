"""EOPD: numbers of the card, limits, and that the forward part is added and gated by the teacher's
entropy.
"""

from __future__ import annotations

import math

import pytest
import torch

import opdkit.testing as testing
from opdkit.methods.method import load
from opdkit.objective import Objective
from opdkit.testing import evaluate
from tests.methods.toy import (
    P_S,
    P_T,
    close,
    expected,
    logits,
    numbers,
    reverse_kl_gradient,
    tokens,
)

S, T = logits(P_S), {"teacher": logits(P_T)}
SURE = {"teacher": logits((0.9, 0.05, 0.05))}  # H = 0.394398


def forward(**arguments):
    """The forward-KL term alone."""
    return Objective(load("eopd", **arguments).objective.terms[1])


def test_a_sure_teacher_leaves_plain_opd():
    ours, plain = (evaluate(load(m), S, tokens(1), models=SURE) for m in ("eopd", "opd"))
    assert ours.terms[1].weight.sum() == 0
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.grad, plain.grad)
    # H = 1.029653 >= 0.8
    assert evaluate(load("eopd"), S, tokens(1), models=T).terms[1].weight.item() == 1


@pytest.mark.parametrize(
    ("rest", "value", "gradient"),
    [("target", 0.694459, (0.5, -0.325, -0.175)), ("renormalise", 0.001312, (0, -0.025, 0.025))],
)
def test_forward_part_on_the_teachers_two_best(rest, value, gradient):
    out = evaluate(forward(k=2, rest=rest), S, tokens(0), models=T)
    assert close(out.loss, value) and close(out.grad[0, 0], gradient)


def test_total_at_a_sampled_token():
    out = evaluate(load("eopd", k=2), S, tokens(1), models=T)
    assert close(out.loss, 0.183633) and close(out.grad[0, 0], (0.755413, -0.682578, -0.072835))
    assert close(
        out.grad[0, 0] - evaluate(forward(k=2), S, tokens(1), models=T).grad[0, 0],
        (0.255413, -0.357578, 0.102165),
    )


def test_expected_gradient_is_reverse_kl_plus_the_forward_part():
    p, target = numbers(*P_S), numbers(0, 0.625, 0.375)
    assert close(
        expected(load("eopd", k=2), P_S, P_T), reverse_kl_gradient(P_S, P_T) + p - target, 12
    )


def test_forward_part_is_divided_by_all_trained_tokens():
    teacher = {"teacher": logits(P_T, (0.9, 0.05, 0.05))}
    out = evaluate(load("eopd", k=2), logits(P_S, P_S), tokens(0, 0), models=teacher)
    assert out.terms[1].weight.tolist() == [[1, 0]] and close(out.terms[1].value, 0.347230)


def test_k_of_the_whole_vocabulary_is_the_exact_forward_kl():
    out = evaluate(forward(k=3), S, tokens(0), models=T)
    assert close(out.loss, 0.193794) and close(out.grad[0, 0], (0.3, -0.2, -0.1))


@pytest.mark.parametrize("off", [{"alpha": 0.0}, {"tau": math.inf}, {"tau": 100.0}])
def test_switched_off_it_is_opd(off):
    ours, plain = (evaluate(m, S, tokens(2), models=T) for m in (load("eopd", **off), load("opd")))
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.grad, plain.grad)


def test_agreement_leaves_the_bias_of_the_truncated_target():
    same = {"teacher": S}
    out = evaluate(load("eopd", k=2, tau=0.0), S, tokens(0), models=same)
    assert close(out.loss, -math.log(0.8), 12) and close(
        out.grad[0, 0], (0.5 - 0.625, 0.3 - 0.375, 0.2), 12
    )
    assert close(
        evaluate(load("eopd", k=3, tau=0.0), S, tokens(0), models=same).grad,
        torch.zeros(1, 1, 3),
        12,
    )


@pytest.mark.parametrize(
    ("teacher", "gate"), [((1 / 3,) * 3, 1), ((0.5, 0.5, 0.0), 0), ((1.0, 0.0, 0.0), 0)]
)
def test_gate_of_uniform_and_certain_teachers(teacher, gate):
    # log 3 = 1.10, log 2 = 0.69, 0
    out = evaluate(load("eopd"), S, tokens(0), models={"teacher": logits(teacher)})
    assert out.terms[1].weight.item() == gate and out.grad.isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"rest": "renormalise", "k": 4}, {"clip": (0.2, 0.2), "dual_clip": 3, "rollout_cap": 5}],
)
def test_check(arguments):
    testing.check(load("eopd", **arguments))
