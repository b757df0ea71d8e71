"""vOPD: a baseline that changes the variance of the credit and not the mean of the gradient."""

from __future__ import annotations

import pytest
import torch

from opdkit.methods.method import load
from opdkit.objective import LogRatio, Objective, PolicyGradient
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
REVERSE = (0.346243, -0.220389, -0.125854)


def each(method, student=P_S, teacher=P_T):
    return [
        evaluate(method, logits(student), tokens(y), models={"teacher": logits(teacher)})
        for y in range(len(student))
    ]


def credit(method, **models):
    return torch.stack([out.terms[0].credit[0, 0] for out in each(method, **models)])


def test_credit():
    a = credit(load("vopd"))
    assert close(a, (-0.692486, 0.734630, 0.629270)) and close((numbers(*P_S) * a).sum(), 0.0, 12)
    assert close(a - credit(load("opd")), (0.223805,) * 3)


@pytest.mark.parametrize(
    ("y", "gradient"),
    [
        (0, (0.346243, -0.207746, -0.138497)),
        (1, (0.367315, -0.514241, 0.146926)),
        (2, (0.314635, 0.188781, -0.503416)),
    ],
)
def test_gradient_of_a_sample(y, gradient):
    out = each(load("vopd"))[y]
    assert close(out.grad[0, 0], gradient)
    a = out.terms[0].credit.item()
    # none through the baseline
    assert close(out.grad[0, 0], a * (numbers(*P_S) - torch.eye(3, dtype=torch.float64)[y]), 12)


@pytest.mark.parametrize("arguments", [{}, {"k": 1}, {"k": 2}, {"k": 3}])
def test_expected_gradient(arguments):
    mean = expected(load("vopd", **arguments), P_S, P_T)
    assert close(mean, REVERSE) and close(mean, expected(load("opd"), P_S, P_T), 12)
    assert close(mean, reverse_kl_gradient(P_S, P_T), 12)


def test_top_two():
    a = credit(load("vopd", k=2))
    assert close(a, (-0.668700, 0.758416, 0.653056)) and close((numbers(*P_S) * a).sum(), 0.023786)


@pytest.mark.parametrize("k", [3, 5])
def test_a_large_k_is_the_whole_vocabulary(k):
    assert close(credit(load("vopd", k=k)), credit(load("vopd")), 12)


@pytest.mark.parametrize("arguments", [{}, {"k": 2}])
def test_agreement_is_zero(arguments):
    for out in each(load("vopd", **arguments), teacher=P_S):
        assert out.loss == 0 and (out.grad == 0).all()


def spread(method):
    """Trace of the covariance of the gradient."""
    p, g = numbers(*P_S), torch.stack([out.grad[0, 0] for out in each(method)])
    mean = (p[:, None] * g).sum(0)
    return (p[:, None] * (g - mean).square()).sum()


def test_variances():
    p = numbers(*P_S)
    assert (p * credit(load("vopd")).square()).sum() < (p * credit(load("opd")).square()).sum()
    for seed in range(20):
        a, b = torch.randn(
            2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).softmax(-1)
        r = (b / a).log()
        ours = credit(load("vopd"), student=a.tolist(), teacher=b.tolist())
        variance = (a * r.square()).sum() - (a * r).sum().square()
        assert (
            close((a * ours.square()).sum(), variance.item(), 9)
            and variance <= (a * r.square()).sum()
        )
    # the gradient's spread, in contrast, need not fall
    assert close(spread(load("vopd")), 0.110715) and close(spread(load("opd")), 0.068510)
    best = Objective(PolicyGradient(LogRatio("teacher", "student") - 0.040176))
    assert close(spread(best), 0.067510)


def test_the_baseline_is_that_before_the_step():
    now, before = logits((0.1, 0.2, 0.7)), S
    out = evaluate(load("vopd"), now, tokens(1), models=T, before_logits=before)
    assert close(out.terms[0].credit, [[0.734630]]) and close(out.loss, -0.734630 * 0.2 / 0.3)
