"""DistiLLM: the skewed divergences in value, gradient and bound, and who writes its batches."""

from __future__ import annotations

import math

import pytest

from opdkit.base.errors import UserError
from opdkit.curricula import Plain, Replay
from opdkit.methods.method import load
from opdkit.objective import Divergence
from opdkit.testing import check, evaluate
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens

FAR_S, FAR_T = (0.98, 0.01, 0.01), (0.01, 0.98, 0.01)


def at(method, student=P_S, teacher=P_T):
    out = evaluate(method, logits(student), tokens(0), models={"teacher": logits(teacher)})
    return out.loss, out.grad[0, 0]


@pytest.mark.parametrize(
    ("kind", "alpha", "value", "gradient"),
    [
        ("skew_forward", 0.1, 0.159263, (0.243764, -0.160723, -0.083041)),
        ("skew_forward", 0.0, 0.193794, (0.3, -0.2, -0.1)),
        ("skew_reverse", 0.1, 0.172951, (0.263713, -0.169265, -0.094448)),
        ("skew_reverse", 0.0, 0.223805, (0.346243, -0.220389, -0.125854)),
    ],
)
def test_value_and_gradient(kind, alpha, value, gradient):
    loss, grad = at(load("distillm", kind=kind, alpha=alpha))
    assert close(loss, value) and close(grad, gradient)


def test_the_codes_value_is_larger_by_the_teachers_entropy():
    t, s = numbers(*P_T), numbers(*P_S)
    entropy, cross = -(t * t.log()).sum(), -(t * (0.1 * t + 0.9 * s).log()).sum()
    assert close(entropy, 1.029653) and close(cross, 1.188916)
    assert close(at(load("distillm"))[0] + entropy, cross.item(), 12)


def test_their_mean_at_one_half_is_jensen_shannon():
    skl, srkl = (
        at(load("distillm", kind=kind, alpha=0.5))[0] for kind in ("skew_forward", "skew_reverse")
    )
    assert close(skl, 0.054345) and close(srkl, 0.047404)
    assert close((skl + srkl) / 2, 0.050875) and close(
        (skl + srkl) / 2, at(load("gkd"))[0].item(), 12
    )


def test_its_other_losses_are_elsewhere():
    assert close(at(load("gkd", beta=0.1))[0], 0.017563)  # its js at 0.9
    assert close(at(Divergence("tv"))[0], 0.3)
    symmetric = 0.1 * Divergence("forward_kl") + 0.9 * Divergence("reverse_kl")
    assert close(at(symmetric)[0], 0.1 * 0.193794 + 0.9 * 0.223805)


@pytest.mark.parametrize("kind", ["skew_forward", "skew_reverse"])
def test_bounded_where_models_are_disjoint(kind):
    assert close(at(Divergence("forward_kl"), FAR_S, FAR_T)[0], 4.447418)
    assert close(at(load("distillm", kind=kind), FAR_S, FAR_T)[0], 2.125622)
    apart = at(load("distillm", kind=kind), (1 - 2e-30, 1e-30, 1e-30), (1e-30, 1 - 2e-30, 1e-30))[0]
    assert close(apart, -math.log(0.1)) and close(apart, 2.302585)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("kind", ["skew_forward", "skew_reverse"])
def test_agreement_is_zero(kind, alpha):
    loss, grad = at(load("distillm", kind=kind, alpha=alpha), P_S, P_S)
    assert close(loss, 0.0, 12) and close(grad, [0.0, 0.0, 0.0], 12)


def test_who_writes():
    method = load("distillm", schedule="constant", threshold=0.2, tolerance=0.3, capacity=64)
    assert method.curriculum == Replay("constant", 0.2, 0.3, 64)
    assert load("distillm", schedule=None).curriculum == Plain()


@pytest.mark.parametrize(
    "arguments", [{}, {"kind": "skew_reverse"}, {"alpha": 0.0}, {"schedule": None}]
)
def test_check(arguments):
    check(load("distillm", **arguments))


def test_bad_arguments_are_explained():
    for arguments, message in (
        ({"kind": "jsd"}, "skew_forward"),
        ({"alpha": 1.0}, "the divergence is zero"),
        ({"schedule": "cosine"}, "one of decreasing"),
        ({"threshold": 2.0}, "share of student text"),
    ):
        with pytest.raises(UserError, match=message):
            load("distillm", **arguments)
