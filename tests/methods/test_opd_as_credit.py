"""Any divergence as the credit of a drawn token: single-sample OPD with another f."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective import JSD, ForwardKL, Hellinger2, Kind, ReverseKL
from opdkit.objective.divergences import KINDS, kind_of
from opdkit.testing import check, evaluate
from tests.methods.steps import agrees, at, step
from tests.methods.toy import close, expected, logits, numbers, tokens

TEACHER = (0.5, 0.3, 0.2)
STUDENT = tuple(numbers(0.1, -0.3, 0.4).softmax(-1).tolist())


@dataclass(frozen=True)
class Softened(Kind):
    """2 KL(m || teacher), m the mean of both: f-distill's softened reverse KL."""

    def entries(self, ls, lt):
        m = torch.logaddexp(ls, lt) - math.log(2)
        return 2 * m.exp() * (m - lt)


def credit(kind, y, student=STUDENT, teacher=TEACHER):
    made = load("opd", kind=kind, as_credit=True)
    out = evaluate(made, logits(student), tokens(y), models={"teacher": logits(teacher)})
    return out.terms[0].credit[0, 0].item()


@pytest.mark.parametrize(
    ("kind", "times", "gradient"),
    [
        (ReverseKL(), 1, (-0.188139, -0.101516, 0.289656)),
        (ForwardKL(), 1, (-0.168894, -0.078053, 0.246947)),
        (JSD(), 2, (-0.086257, -0.043351, 0.129607)),  # twice opdkit's
        (Hellinger2(), 1, (-0.043864, -0.022052, 0.065916)),
    ],
)
def test_expected_gradients(kind, times, gradient):
    """Those of f-distill's token form, and of the whole sum over the vocabulary."""
    found = expected(load("opd", kind=kind, as_credit=True), STUDENT, TEACHER)
    assert close(times * found, gradient)
    assert close(found, expected(load("opd", kind=kind, support="full"), STUDENT, TEACHER), 12)


@pytest.mark.parametrize("kind", [*KINDS, Softened()], ids=str)
def test_every_kind_has_the_gradient_of_its_divergence(kind):
    found = expected(load("opd", kind=kind, as_credit=True), STUDENT, TEACHER)
    assert close(found, expected(load("opd", kind=kind, support="full"), STUDENT, TEACHER), 12)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (ForwardKL(), (0.021186, 0.105932, 0.211864, 0.423729, 4.237288)),
        (JSD(), (0.178723, 0.655319, 0.982979, 1.310638, 1.872340)),
        (Softened(), (1.850220, 1.356828, 1.017621, 0.678414, 0.096916)),
        (ReverseKL(), (1.0,) * 5),
    ],
)
def test_credits_rise_with_the_ratio_as_f_distills_weights(kind, weights):
    """d credit / d log(pi_t/pi_s) = h at ratios .1, .5, 1, 2, 20, divided by its mean: an f times a
    number has the same.
    """
    log_r, eps = numbers(0.1, 0.5, 1.0, 2.0, 20.0).log(), 1e-5
    h = (kind.slope(-log_r + eps) - kind.slope(-log_r - eps)) / (2 * eps)
    assert close(h / h.mean(), weights)


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("reverse_kl", lambda r: math.log(r)),
        ("forward_kl", lambda r: r - 1),
        ("jsd", lambda r: math.log((1 + r) / 2) / 2),
        ("hellinger2", lambda r: (math.sqrt(r) - 1) / 2),
        ("tv", lambda r: math.copysign(0.5, r - 1)),
        ("chi2", lambda r: 2 * (1 - 1 / r)),
    ],
)
def test_credits_in_closed_form(kind, of):
    for y in range(3):
        assert credit(kind, y) == pytest.approx(of(TEACHER[y] / STUDENT[y]), abs=1e-12)
    assert all(credit(kind, y, TEACHER) == 0 for y in range(3))  # where the two agree: nothing


def test_the_log_ratio_is_reverse_kls_credit_already():
    assert load("opd", as_credit=True).objective == load("opd").objective
    assert load("opd", kind=ReverseKL()).objective == load("opd").objective
    whole = load("opd", as_credit=True, discount=1.0)
    assert whole.objective == load("opd", discount=1.0).objective


def test_a_token_that_the_teacher_rejects_costs_no_more_than_log_two():
    """Twice the JSD: log((1 + r) / 2), -log 2 at least, and like log r for what it prefers."""
    sure = (1e-12, 1 - 1e-12)
    assert 2 * credit("jsd", 0, sure[::-1], sure) == pytest.approx(-math.log(2), abs=1e-11)
    assert 2 * credit("jsd", 0, sure, sure[::-1]) == pytest.approx(math.log(0.5e12), abs=1e-9)
    assert credit("reverse_kl", 0, sure[::-1], sure) < -27
    never = torch.tensor([[[-math.inf, 0.0]]]).double()
    made = load("opd", kind="jsd", as_credit=True)
    out = evaluate(made, logits((0.5, 0.5)), tokens(0), models={"teacher": never})
    assert out.terms[0].credit.item() == pytest.approx(-math.log(2) / 2)
    assert out.grad.isfinite().all()


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("settings", [{}, {"clip": (0.1, 0.2)}, {"divergence_mask": 0.05}], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "alpha"])
def test_it_is_the_naive_formula(kind, settings, fresh):
    case = step(11, fresh)

    def reference(ls, said):
        y, mask = case.tokens, case.mask
        u = (at(said["before"], y) - at(said["teacher"], y)).exp()
        a = {
            "forward_kl": 1 / u - 1,
            "jsd": ((1 + 1 / u) / 2).log() / 2,
            "alpha": 2 * (u**-0.5 - 1),
        }[kind]
        p, mu = at(ls, y).exp(), at(said["before"], y).exp()
        each = -a * p / mu
        if "clip" in settings:
            each = torch.maximum(each, -a * (p / mu).clamp(0.9, 1.2))
        if "divergence_mask" in settings:
            each = torch.where(((p - mu).abs() >= 0.05) & (a * (p - mu) > 0), 0.0, each)
        each = each * mu / at(said["sampler"], y).exp()
        return each[mask].mean()

    assert agrees(load("opd", kind=kind, as_credit=True, **settings), case, reference)


def test_it_asks_for_log_probs_of_the_tokens_alone():
    for kind in KINDS:
        assert not load("opd", kind=kind, as_credit=True).needs.whole("teacher")


@pytest.mark.parametrize("kind", [*KINDS, JSD(0.1), Softened()], ids=str)
def test_check(kind):
    check(load("opd", kind=kind, as_credit=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"support": "full"}, "compares others as well"),
        ({"support": "teacher", "k": 5}, "compares others as well"),
        ({"k": 5, "kind": "jsd"}, "name it, support="),
        ({"discount": 0.5, "kind": "jsd"}, "use f_dpg"),
        ({"kind": "js"}, "unknown divergence"),
    ],
)
def test_bad_arguments_are_explained(arguments, words):
    with pytest.raises(UserError, match=words):
        load("opd", as_credit=True, **arguments)


def test_a_beta_says_the_kind():
    assert load("opd", beta=0.3, as_credit=True).objective == (
        load("opd", kind=JSD(0.3), as_credit=True).objective
    )
    assert kind_of("jsd") == JSD()


@pytest.mark.parametrize("kind", [*KINDS, Softened()], ids=str)
def test_models_far_apart_have_a_finite_credit_in_float32(kind):
    """A token e^150 times as probable to one model as to the other: float32 ends at e^88."""
    method, far, flat = (
        load("opd", kind=kind, as_credit=True),
        numbers(-150, 0, 0.3),
        numbers(0, 0, 0),
    )
    for student, teacher in ((far, flat), (flat, far)):
        wide, narrow = (
            evaluate(method, s[None, None], tokens(0), models={"teacher": t[None, None]})
            for s, t in ((student, teacher), (student.float(), teacher.float()))
        )
        assert narrow.loss.abs() < 1.001 * math.exp(20)
        assert torch.allclose(narrow.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)
