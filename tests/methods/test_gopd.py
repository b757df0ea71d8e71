"""G-OPD and ExOPD: credits, gradients and optimum of the card, and the reference that is not loaded
at scale 1.
"""

from __future__ import annotations

import pytest
import torch

from opdkit.methods.method import load
from opdkit.testing import evaluate, fabricate
from tests.methods.toy import P_S, P_T, binary, close, logits, numbers, tokens

P_REF = (0.4, 0.4, 0.2)
OPD = (-0.916291, 0.510826, 0.405465)


def each(scale, student=P_S, teacher=P_T, reference=P_REF):
    """The evaluation at each token that could be sampled."""
    models = {"teacher": logits(teacher), "reference": logits(reference)}
    return [
        evaluate(load("gopd", scale=scale), logits(student), tokens(y), models=models)
        for y in range(3)
    ]


def credit(scale, **models):
    return torch.stack([out.terms[0].credit[0, 0] for out in each(scale, **models)])


def gradient(scale, student=P_S, **models):
    return sum(p * out.grad[0, 0] for p, out in zip(student, each(scale, student, **models)))


@pytest.mark.parametrize(
    ("scale", "numbers_"),
    [
        (0, (-0.223144, 0.287682, 0)),
        (0.5, (-0.569717, 0.399254, 0.202733)),
        (1, OPD),
        (1.25, (-1.089578, 0.566612, 0.506831)),
        (1.5, (-1.262864, 0.622397, 0.608198)),
    ],
)
def test_credits(scale, numbers_):
    assert close(credit(scale), numbers_)
    # affine in the scale
    assert close(credit(scale), (1 - scale) * credit(0) + scale * credit(1), 12)


def test_at_zero_the_teacher_drops_out():
    assert close(credit(0), credit(0, teacher=(0.6, 0.1, 0.3)), 12)
    assert close(credit(0), (numbers(*P_REF) / numbers(*P_S)).log(), 12)


def test_at_one_it_is_opd_bit_for_bit_and_no_reference_is_read():
    gopd, opd = load("gopd"), load("opd")
    assert gopd.objective == opd.objective and "reference" not in gopd.needs.models
    case = fabricate(opd.objective)
    assert torch.equal(case.run(gopd.objective).grad, case.run(opd.objective).grad)
    assert "reference" in load("exopd").needs.models


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.25, (0.408069, -0.252015, -0.156054)), (0.5, (0.222591, -0.157137, -0.065454))],
)
def test_full_gradient(scale, expected):
    assert close(gradient(scale), expected)
    z = logits(P_S)[0, 0].requires_grad_()
    p, lt, lr = z.softmax(0), numbers(*P_T).log(), numbers(*P_REF).log()
    loss = (p * (p.log() - lt)).sum() - (scale - 1) * (p * (lt - lr)).sum()  # -J
    assert close(gradient(scale), torch.autograd.grad(loss, z)[0], 12)


def test_at_the_optimum_the_credit_is_the_same_for_every_token():
    best = numbers(*P_T) ** 1.25 * numbers(*P_REF) ** -0.25
    assert close(best.sum().log(), 0.028461)
    best = best / best.sum()
    assert close(best, (0.163460, 0.513851, 0.322689))
    assert close(credit(1.25, student=best.tolist()), (0.028461,) * 3)
    assert close(gradient(1.25, student=best.tolist()), (0, 0, 0), 12)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.25, 2.0])
def test_reference_that_is_the_teacher_or_the_student(scale):
    assert close(credit(scale, reference=P_T), OPD)
    assert close(credit(scale, reference=P_S), scale * credit(1), 12)  # the first step: OPD scaled


@pytest.mark.parametrize(("log_ratio", "weight"), [(0.5, 1.648721), (2, 5.0), (-1, 0.367879)])
def test_truncated_weights(log_ratio, weight):
    models = {"teacher": binary([-0.5]), "reference": binary([-2.0])}
    sampler = binary([-1.5 - log_ratio])
    out = evaluate(
        load("exopd", rollout_cap=5.0),
        binary([-1.5]),
        tokens(0),
        models=models,
        sampler_logits=sampler,
    )
    assert close(out.terms[0].weight, [[weight]])
    assert close(out.loss, -weight * (1.0 + 0.25 * 1.5), 5)


def test_rows_do_not_see_each_others_teacher():
    """Two domains with a teacher each: every row has the gradient it would have, were its teacher
    the only one.
    """
    objective = load("exopd").objective
    a, b = fabricate(objective, 0), fabricate(objective, 1)
    domain = torch.tensor([True, False, True, False, False, True])[:, None, None]
    other = a.models | {"teacher": b.models["teacher"]}
    mixed = a.models | {"teacher": torch.where(domain, a.models["teacher"], b.models["teacher"])}
    grads = [
        type(a)(**{**vars(a), "models": m}).run(objective).grad for m in (a.models, other, mixed)
    ]
    assert close(grads[2], torch.where(domain, grads[0], grads[1]), 12) and not torch.equal(
        grads[0], grads[1]
    )


def test_exopd_is_gopd_at_its_scale():
    assert load("exopd").objective == load("gopd", scale=1.25).objective
