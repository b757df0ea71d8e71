"""CR-OPD: where the mass of a disowned token goes, and when the update is the plain one."""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
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


def test_mass_goes_where_the_teacher_wants_it():
    out = evaluate(load("cr_opd"), S, tokens(0), models=T)
    assert close(out.loss, 1.242511) and close(out.grad[0, 0], (0.458145, -0.297794, -0.160351))
    assert close(out.grad[0, 0], 0.916291 * (numbers(*P_S) - numbers(0, 0.625, 0.375)))
    plain = evaluate(load("opd"), S, tokens(0), models=T)
    assert close(plain.grad[0, 0], (0.458145, -0.274887, -0.183258))
    # the same push on the token itself
    assert close(out.grad[0, 0, 0], plain.grad[0, 0, 0].item(), 12)


@pytest.mark.parametrize("arguments", [{"k": 1}, {"eps": 0.4}])
def test_only_reachable_favourites_of_the_teacher_are_destinations(arguments):
    out = evaluate(load("cr_opd", **{"eps": 0.25, **arguments}), S, tokens(0), models=T)
    # p_s < 0.4 everywhere else: nowhere to go
    destination = numbers(0, 1, 0) if "k" in arguments else None
    plain = evaluate(load("opd"), S, tokens(0), models=T)
    assert close(
        out.grad[0, 0],
        plain.grad[0, 0] if destination is None else 0.916291 * (numbers(*P_S) - destination),
    )


@pytest.mark.parametrize("y", [1, 2])
def test_wanted_tokens_have_the_plain_update(y):
    ours, plain = (evaluate(load(m), S, tokens(y), models=T) for m in ("cr_opd", "opd"))
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.grad, plain.grad)


def test_a_teacher_that_only_lowers_the_token_has_the_plain_update():
    # odds 0.3 : 0.2 on the others, as the student's
    teacher = {"teacher": logits((0.2, 0.48, 0.32))}
    ours, plain = (evaluate(load(m), S, tokens(0), models=teacher) for m in ("cr_opd", "opd"))
    assert close(ours.grad, plain.grad, 12)


def test_expected_gradient_differs_from_reverse_kl_by_the_destinations():
    q, rest = numbers(0, 0.625, 0.375), numbers(0, 0.6, 0.4)  # token 0, sampled half of the time
    moved = 0.5 * 0.91629073 * (rest - q)
    assert close(expected(load("cr_opd"), P_S, P_T), reverse_kl_gradient(P_S, P_T) + moved)


def test_agreement_is_zero():
    out = evaluate(load("cr_opd"), S, tokens(0), models={"teacher": S})
    assert out.loss == 0 and (out.grad == 0).all()


@pytest.mark.parametrize(
    "arguments", [{}, {"k": 3, "eps": 0.01}, {"clip": (0.2, 0.2), "dual_clip": 3, "rollout_cap": 5}]
)
def test_check(arguments):
    check(load("cr_opd", **arguments))


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="out of reach"):
        load("cr_opd", eps=0.0)
