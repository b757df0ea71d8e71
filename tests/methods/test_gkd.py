"""GKD: the generalised Jensen-Shannon divergence in value and gradient, its ends, and its share of
student text.
"""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective import Objective
from opdkit.testing import Case, evaluate
from tests.methods.toy import P_S, P_T, close, logits, tokens

S, T = logits(P_S), {"teacher": logits(P_T)}


def loss(student=P_S, teacher=P_T, **arguments):
    return evaluate(
        load("gkd", **arguments), logits(student), tokens(0), models={"teacher": logits(teacher)}
    ).loss.item()


@pytest.mark.parametrize(
    ("beta", "value", "gradient"),
    [
        (0, 0.193794, (0.3, -0.2, -0.1)),
        (0.1, 0.017563, (0.027026, -0.017916, -0.009109)),
        (0.5, 0.050875, (0.077318, -0.050263, -0.027055)),
        (0.9, 0.019661, (0.030179, -0.019289, -0.010890)),
        (1, 0.223805, (0.346243, -0.220389, -0.125854)),
    ],
)
def test_values_and_gradients(beta, value, gradient):
    out = evaluate(load("gkd", beta=beta), S, tokens(0), models=T)
    assert close(out.loss, value) and close(out.grad[0, 0], gradient)


def test_the_ends_are_a_jump_that_the_normalised_form_has_not():
    assert loss(beta=0.001) / 0.001 == pytest.approx(0.193613, abs=5e-7)
    assert loss(beta=0.0001) / 0.0001 == pytest.approx(0.193776, abs=5e-7)
    assert loss(beta=0.999) / 0.001 == pytest.approx(0.223523, abs=5e-7)
    assert loss(beta=0.9999) / 0.0001 == pytest.approx(0.223776, abs=5e-7)
    for beta, value in ((0.1, 0.195140), (0.5, 0.203498), (0.9, 0.218458)):
        assert loss(beta=beta, normalised=True) == pytest.approx(value, abs=5e-7)
    for end, near in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
        assert loss(beta=near, normalised=True) == pytest.approx(
            loss(beta=end, normalised=True), abs=1e-6
        )
        assert loss(beta=end, normalised=True) == loss(beta=end)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_swapping_the_models_swaps_beta(beta):
    assert loss(beta=beta) == pytest.approx(loss(P_T, P_S, beta=1 - beta), abs=1e-12)


def test_half_is_symmetric_and_at_most_log_two():
    assert loss() == pytest.approx(loss(P_T, P_S), abs=1e-12)
    for seed in range(20):
        a, b = (
            torch.randn(4, generator=torch.Generator().manual_seed(s)).mul(5).softmax(0).tolist()
            for s in (seed, seed + 100)
        )
        assert 0 < loss(a, b) <= math.log(2)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_disjoint_supports_are_finite(beta):
    student, teacher = (
        torch.tensor([[[0.0, 0.0, -math.inf]]]).double(),
        torch.tensor([[[-math.inf, -math.inf, 0.0]]]).double(),
    )
    out = evaluate(load("gkd", beta=beta), student, tokens(0), models={"teacher": teacher})
    assert (
        close(out.loss, -beta * math.log(beta) - (1 - beta) * math.log(1 - beta))
        and out.grad.isfinite().all()
    )


@pytest.mark.parametrize(
    "arguments",
    [{}, {"beta": 0}, {"beta": 1}, {"beta": 0.1, "normalised": True}, {"temperature": 2.0}],
)
def test_agreement_is_zero(arguments):
    out = evaluate(load("gkd", **arguments), S, tokens(0), models={"teacher": S})
    assert close(out.loss, 0.0, 12) and close(out.grad, torch.zeros(1, 1, 3), 12)


def test_temperature_divides_the_logits_of_both():
    hot = evaluate(load("gkd", temperature=2.0), S, tokens(0), models=T)
    plain = evaluate(load("gkd"), S / 2, tokens(0), models={"teacher": T["teacher"] / 2})
    # and no factor T^2
    assert close(hot.loss, plain.loss.item(), 12) and close(hot.grad, plain.grad / 2, 12)


def test_who_writes():
    assert (
        load("gkd").curriculum.student_share == 1.0
        and load("gkd", lmbda=0.25).curriculum.student_share == 0.25
    )
    assert load("gkd", lmbda=0.0).curriculum.student_share == 0.0
    # of the data's tokens it is only where the data writes
    assert load("gkd", lmbda=0.3).objective == Objective(
        load("gkd").objective.terms[0].of("student", "data")
    )


def test_special_cases():
    forward, full = load("opd", kind="forward_kl"), load("opd", support="full")
    for ours, other in ((load("gkd", beta=0.0), forward), (load("gkd", beta=1.0), full)):
        a, b = (evaluate(m, S, tokens(0), models=T) for m in (ours, other))
        assert torch.equal(a.loss, b.loss) and torch.equal(a.grad, b.grad)


def test_an_empty_mask_is_a_zero():
    out = evaluate(load("gkd"), S, tokens(0), torch.zeros(1, 1, dtype=torch.bool), T)
    assert out.loss == 0 and (out.grad == 0).all()


def test_two_micro_batches_of_three_and_five_tokens_equal_one_of_eight():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([3, 5])[:, None]
    case = Case(torch.randint(4, (2, 5), generator=g), student, mask, {"teacher": teacher})
    objective = load("gkd").objective
    one, two = case.run(objective), case.run(objective, [[0], [1]])
    assert close(two.loss, one.loss.item(), 12) and close(two.grad, one.grad, 12)
    alone = [
        evaluate(
            objective, student[[i], :n], case.tokens[[i], :n], models={"teacher": teacher[[i], :n]}
        )
        for i, n in enumerate((3, 5))
    ]
    assert close(one.loss, (3 * alone[0].loss + 5 * alone[1].loss).item() / 8, 12)


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="share of batches"):
        load("gkd", lmbda=1.5)
    with pytest.raises(UserError, match="must be positive"):
        load("gkd", temperature=0.0)
