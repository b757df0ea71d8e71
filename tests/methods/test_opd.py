"""OPD: numbers and identities of its card, for the sampled form, its policy-gradient layer, and the
direct divergences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective import Estimator, LogpFact, LogRatio, PolicyGradient, TokenLoss
from opdkit.testing import evaluate
from tests.methods.toy import (
    P_S,
    P_T,
    binary,
    close,
    expected,
    logits,
    numbers,
    reverse_kl_gradient,
    tokens,
)

S, T = logits(P_S), {"teacher": logits(P_T)}
REVERSE, FORWARD = (0.346243, -0.220389, -0.125854), (0.3, -0.2, -0.1)  # gradients of the two KLs
AGAINST = ((0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4))  # for the tail bucket


# --------------------------------------------------------------------------------- the sampled form


@pytest.mark.parametrize(
    ("y", "r", "gradient"),
    [
        (0, -0.916291, (0.458145, -0.274887, -0.183258)),
        (1, 0.510826, (0.255413, -0.357578, 0.102165)),
        (2, 0.405465, (0.202733, 0.121640, -0.324372)),
    ],
)
def test_the_credit_is_the_log_ratio_and_the_gradient_that_of_the_log_prob(y, r, gradient):
    out = evaluate(load("opd"), S, tokens(y), models=T)
    assert (
        close(out.loss, -r)
        and close(out.terms[0].credit, [[r]])
        and close(out.grad[0, 0], gradient)
    )
    assert close(
        out.grad[0, 0],
        -out.terms[0].credit.item() * (torch.eye(3, dtype=torch.float64)[y] - numbers(*P_S)),
        12,
    )


def test_on_average_it_is_the_gradient_of_reverse_kl():
    mean = expected(load("opd"), P_S, P_T)
    assert close(mean, REVERSE) and close(mean, reverse_kl_gradient(P_S, P_T), 12)
    whole = evaluate(load("opd", support="full"), S, tokens(0), models=T)
    # the same, without having to sample
    assert close(whole.loss, 0.223805) and close(whole.grad[0, 0], mean, 12)


def test_importance_sampling_as_a_sum_over_tokens():
    student, sampler, teacher = (
        binary([-0.9, -0.6, -2.2]),
        binary([-1, -0.5, -2]),
        binary([-1.2, -0.4, -1]),
    )
    loss = PolicyGradient(LogRatio("teacher", "sampler")).per("row_sums")
    mask = torch.tensor([[True, True, False]])
    out = evaluate(
        loss, student, tokens(0, 0, 0), mask, {"teacher": teacher}, sampler_logits=sampler
    )
    assert close(out.loss, 0.130550) and close(out.terms[0].credit[0, :2], (-0.2, 0.1))
    slope = out.grad[0, :, 0] / (1 - student.softmax(-1)[0, :, 0])
    assert close(slope, (0.221034, -0.090484, 0))
    mean = evaluate(
        load("opd"), student, tokens(0, 0, 0), mask, {"teacher": teacher}, before_logits=sampler
    )
    assert close(2 * mean.loss, out.loss.item(), 12)  # ours is the mean over the two


ONE, T2 = tokens(0), {"teacher": binary([-1.7])}


@pytest.mark.parametrize(
    ("arguments", "loss"),
    [
        ({}, -1.5),  # rho = pi_s / pi_sampler = 1.5; credit = log(pi_t / pi_before) = 1
        # the second ratio is clipped, at 1.1; the first is a weight
        ({"clip": (0.2, 0.1)}, -1.25 * 1.1),
        ({"rollout_cap": 5.0}, -1.5),  # pi_before / pi_sampler = 1.25, times pi_s / pi_before = 1.2
        ({"rollout_cap": 1.1}, -1.1 * 1.2),
        ({"rollout_cap": 5.0, "clip": (0.2, 0.1)}, -1.25 * 1.1),  # only the second ratio is clipped
    ],
)
def test_student_before_and_sampler_all_differ(arguments, loss):
    sampler, before = numbers(0.2).log(), numbers(0.25).log()
    live, teacher = binary([numbers(0.3).log().item()]), binary([before.item() + 1])
    others = {"before_logits": binary([before.item()]), "sampler_logits": binary([sampler.item()])}
    out = evaluate(load("opd", **arguments), live, ONE, models={"teacher": teacher}, **others)
    clipped = "clip" in arguments
    assert close(out.loss, loss, 12)
    # d loss / d log pi_s = loss
    assert close(out.grad[0, 0], (0, 0) if clipped else (loss * 0.7, -loss * 0.7), 12)


@pytest.mark.parametrize(
    ("credit", "ratio", "loss", "passes"),
    [
        (1, 1.5, -1.2, False),
        (1, 0.5, -0.5, True),
        (-1, 1.5, 1.5, True),
        (-1, 0.5, 0.8, False),
        (-1, 4, 3.0, False),
    ],
)
def test_ppo_layer(credit, ratio, loss, passes):
    live, teacher = binary([-3 + numbers(ratio).log().item()]), {"teacher": binary([-3.0 + credit])}
    out = evaluate(
        load("opd", clip=(0.2, 0.2), dual_clip=3.0),
        live,
        ONE,
        models=teacher,
        before_logits=binary([-3.0]),
    )
    assert close(out.loss, loss) and bool(out.grad.abs().sum() > 0) == passes


@pytest.mark.parametrize(("log_ratio", "weight"), [(0.5, 1.648721), (2, 5.0), (-1, 0.367879)])
def test_truncated_weight_of_trainer_against_sampler(log_ratio, weight):
    out = evaluate(
        load("opd", rollout_cap=5),
        binary([-1]),
        ONE,
        models=T2,
        sampler_logits=binary([-1 - log_ratio]),
    )
    assert close(out.terms[0].weight, [[weight]])
    plain = evaluate(load("opd"), binary([-1]), ONE, models=T2)
    assert close(out.loss, weight * plain.loss.item(), 5)


@pytest.mark.parametrize(
    ("g", "credit"),
    [(0.5, (-0.25, -0.1, -0.4)), (1.0, (-0.5, -0.3, -0.4)), (0.0, (-0.2, 0.1, -0.4))],
)
def test_discount(g, credit):
    teacher = {"teacher": binary([-1.7, -1.4, -1.9, 0.5 - 1.5])}
    mask = torch.tensor([[True, True, True, False]])
    out = evaluate(load("opd", discount=g), binary([-1.5] * 4), tokens(0, 0, 0, 0), mask, teacher)
    assert close(out.terms[0].credit[0, :3], credit) and (out.grad[0, 3] == 0).all()


def test_a_discounted_credit_passes_over_tokens_that_are_not_trained():
    teacher, mask = {"teacher": binary([-1.7, -1.4, -1.9])}, torch.tensor([[True, False, True]])
    out = evaluate(load("opd", discount=1.0), binary([-1.5] * 3), tokens(0, 0, 0), mask, teacher)
    # a tool's token has no credit and gives none
    assert close(out.terms[0].credit, [[-0.6, 0, -0.4]])


# P(1) at the prefixes (), (0,), (1,); the student's logits are a = 0, b|0 = 0, b|1 = 0.5
STEPS = {(): (0.0, 0.7), (0,): (0.0, 0.4), (1,): (0.5, 0.9)}


def two_steps(discount):
    """d/d(a, b|0, b|1), over the four sequences as the student writes them."""
    total = torch.zeros(3, dtype=torch.float64)
    for y in itertools.product((0, 1), repeat=2):
        at = [STEPS[()], STEPS[y[:1]]]
        student = torch.tensor([[[0.0, z] for z, _ in at]], dtype=torch.float64)
        out = evaluate(
            load("opd", discount=discount),
            student,
            tokens(*y),
            models={"teacher": logits(*((1 - t, t) for _, t in at))},
        )
        chance = student.softmax(-1)[0, torch.arange(2), torch.tensor(y)].prod()
        slope = 2 * chance * out.grad[0, :, 1]  # the mean over two tokens as a sum
        total[0] += slope[0]
        total[1 + y[0]] += slope[1]
    return total


def test_two_steps():
    z = torch.tensor([z for z, _ in STEPS.values()], dtype=torch.float64, requires_grad=True)
    one = torch.tensor([t for _, t in STEPS.values()], dtype=torch.float64)
    value = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product((0, 1), repeat=2):
        s, t = ((p if x else 1 - p) for p, x in ((z.sigmoid()[0], a), (one[0], a)))
        s, t = (m * (p[1 + a] if b else 1 - p[1 + a]) for m, p in ((s, z.sigmoid()), (t, one)))
        value = value + s * (s / t).log()
    (gradient,) = torch.autograd.grad(value, z)
    assert close(value.detach(), 0.233410) and close(gradient, (-0.148914, 0.050683, -0.199427))
    assert close(two_steps(1.0), gradient, 12)  # future credit: the sequence divergence
    # immediate credit: biased, on early tokens only
    assert close(two_steps(0.0), (-0.211824, 0.050683, -0.199427))


# ------------------------------------------------------------------------------------ direct losses


@dataclass(frozen=True)
class K1(TokenLoss):
    """log pi_s - log pi_t, backpropagated: what `Estimator` refuses."""

    def value(self, live):
        return live.logp - live.read(LogpFact("teacher"))


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [
        (K1(), 0.223805, (0, 0, 0)),
        (Estimator("k2"), 0.265479, REVERSE),
        (Estimator("k3"), 0.223805, FORWARD),
        (Estimator("k1+"), 0.223805, REVERSE),
        (Estimator("k3+"), 0.223805, REVERSE),
    ],
)
def test_estimators_on_average(loss, value, gradient):
    outs = [evaluate(loss, S, tokens(y), models=T) for y in range(3)]
    assert close(sum(p * o.loss for p, o in zip(P_S, outs)), value)
    assert close(sum(p * o.grad[0, 0] for p, o in zip(P_S, outs)), gradient)


@pytest.mark.parametrize(
    ("beta", "value"),
    [(0.1, 0.017563), (0.5, 0.050875), (0.9, 0.019661), (0, 0.193794), (1, 0.223805)],
)
def test_generalised_jensen_shannon(beta, value):
    assert close(evaluate(load("opd", beta=beta), S, tokens(1), models=T).loss, value)


@pytest.mark.parametrize(
    ("arguments", "value", "gradient"),
    [
        ({"support": "student"}, 0.247591, (0.334480, -0.334480, 0)),
        ({"support": "teacher"}, 0.001322, (0, -0.025287, 0.025287)),
        (
            {"support": "teacher", "kind": "forward_kl", "rest": "raw"},
            0.377052,
            (0.4, -0.26, -0.14),
        ),
    ],
)
def test_top_two(arguments, value, gradient):
    out = evaluate(load("opd", k=2, **arguments), S, tokens(0), models=T)
    assert close(out.loss, value) and close(out.grad[0, 0], gradient)


def test_the_top_is_that_before_the_step():
    now = logits((0.1, 0.2, 0.7))  # would choose {1, 2}
    out = evaluate(load("opd", support="student", k=2), now, tokens(0), models=T, before_logits=S)
    s, t = numbers(1 / 3, 2 / 3), numbers(2 / 7, 5 / 7)
    assert close(out.loss, (s * (s / t).log()).sum().item(), 12) and out.grad[0, 0, 2] == 0


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"support": "full"}, 0.456435),
        ({"support": "full", "kind": "forward_kl"}, 0.456435),
        ({"support": "student", "k": 2, "rest": "tail"}, 0.421968),
        ({"support": "student", "k": 2, "rest": "tail", "kind": "forward_kl"}, 0.373386),
        # the tail is one token: nothing is lost
        ({"support": "student", "k": 3, "rest": "tail"}, 0.456435),
        ({"support": "student", "k": 4, "rest": "tail"}, 0.456435),
    ],
)
def test_tail_bucket(arguments, value):
    student, teacher = map(logits, AGAINST)
    assert close(
        evaluate(load("opd", **arguments), student, tokens(0), models={"teacher": teacher}).loss,
        value,
    )


# ------------------------------------------------------------------------------ limits and refusals

FORMS = [
    {},
    {"discount": 1.0},
    {"clip": (0.2, 0.2), "dual_clip": 3.0, "rollout_cap": 5.0},
    {"support": "full"},
    {"beta": 0.5},
]
FORMS += [
    {"support": s, "k": 2, "rest": r}
    for s in ("teacher", "student", "union")
    for r in ("renormalise", "tail")
]


@pytest.mark.parametrize("arguments", FORMS)
def test_agreement_is_zero(arguments):
    student = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]])
    out = evaluate(load("opd", **arguments), student, ids, models={"teacher": student})
    assert close(out.loss, 0.0, 12) and close(out.grad, torch.zeros_like(student), 12)
    if out.terms[0].credit is not None:
        assert (out.terms[0].credit == 0).all()


def test_supports_are_different_losses():
    student, teacher = map(logits, AGAINST)

    def loss(support, k=2):
        return evaluate(
            load("opd", support=support, k=k, rest="raw"),
            student,
            tokens(0),
            models={"teacher": teacher},
        ).loss.item()

    assert len({round(loss(s), 6) for s in ("teacher", "student", "union")}) == 3
    assert loss("union") == pytest.approx(loss("full", None))  # {0, 1} and {2, 3} are everything


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"k": 16}, "name it"),
        ({"support": "student"}, "needs k"),
        ({"support": "full", "k": 2}, "takes none"),
        ({"support": "teacher", "k": 2, "discount": 0.5}, "sampled policy gradient"),
        ({"dual_clip": 3.0}, "clip="),
        ({"clip": (0.2, 0.2), "dual_clip": 0.9}, "greater than 1"),
        ({"kind": "reverse_lk"}, "reverse_kl"),
        ({"support": "top", "k": 2}, "intersection"),
        ({"support": "student", "k": 2, "rest": "drop"}, "renormalise"),
        ({"beta": 1.5}, r"\[0, 1\]"),
    ],
)
def test_bad_arguments_are_explained(arguments, words):
    with pytest.raises(UserError, match=words):
        load("opd", **arguments)


def test_a_kind_alone_means_the_full_vocabulary():
    a, b = (
        evaluate(load("opd", **x), S, tokens(0), models=T)
        for x in ({"kind": "forward_kl"}, {"beta": 0.0})
    )
    assert close(a.loss, 0.193794) and close(a.grad[0, 0], FORWARD) and close(b.grad, a.grad, 12)
