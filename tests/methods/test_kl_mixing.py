"""KL mixing: the four distillation objectives, their sequence decomposition, and the mixture."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens


@pytest.mark.parametrize(
    ("lam", "value", "gradient"),
    [
        (0.0, 0.193794, (0.3, -0.2, -0.1)),
        (0.25, 0.201297, (0.311561, -0.205097, -0.106463)),
        (0.5, 0.208799, (0.323122, -0.210195, -0.112927)),
        (1.0, 0.223805, (0.346243, -0.220389, -0.125854)),
    ],
)
def test_mixture(lam, value, gradient):
    for prefix in ("student", "teacher"):  # at a given prefix it does not matter who wrote it
        out = evaluate(
            load("kl_mixing", lam=lam, prefix=prefix),
            logits(P_S),
            tokens(0),
            models={"teacher": logits(P_T)},
        )
        assert close(out.loss, value) and close(out.grad[0, 0], gradient)


def test_prefix_says_who_writes():
    assert (
        load("kl_mixing").curriculum.student_share == 1
        and load("kl_mixing", prefix="teacher").curriculum.student_share == 0
    )


# prefix -> P(1)
STUDENT = {(): 0.5, (0,): 0.5, (1,): torch.tensor(0.5, dtype=torch.float64).sigmoid().item()}
TEACHER = {(): 0.7, (0,): 0.4, (1,): 0.9}


def at(prefix, lam):
    """The loss at one prefix."""
    s, t = (logits((1 - p[prefix], p[prefix])) for p in (STUDENT, TEACHER))
    return evaluate(load("kl_mixing", lam=lam), s, tokens(0), models={"teacher": t}).loss


def over_prefixes(writer, lam):
    return at((), lam) + (1 - writer[()]) * at((0,), lam) + writer[()] * at((1,), lam)


@pytest.mark.parametrize(
    ("writer", "lam", "value"),
    [
        (TEACHER, 0.0, 0.227619),
        (TEACHER, 1.0, 0.283738),
        (STUDENT, 0.0, 0.191848),
        (STUDENT, 1.0, 0.233410),
    ],
)
def test_four_objectives_and_the_two_that_are_sequence_divergences(writer, lam, value):
    loss = over_prefixes(writer, lam)
    assert close(loss, value)

    def chance(model, a, b):
        return (model[()] if a else 1 - model[()]) * (model[a,] if b else 1 - model[a,])

    pairs = list(itertools.product((0, 1), repeat=2))
    s, t = (numbers(*(chance(model, a, b) for a, b in pairs)) for model in (STUDENT, TEACHER))
    forward, reverse = (t * (t / s).log()).sum(), (s * (s / t).log()).sum()
    assert close(forward, 0.227619) and close(reverse, 0.233410)
    matches = [close(loss, forward.item(), 9), close(loss, reverse.item(), 9)]
    assert matches == [writer is TEACHER and lam == 0, writer is STUDENT and lam == 1]


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_agreement_is_zero(lam):
    out = evaluate(
        load("kl_mixing", lam=lam), logits(P_S), tokens(0), models={"teacher": logits(P_S)}
    )
    assert close(out.loss, 0.0, 12) and close(out.grad, torch.zeros(1, 1, 3), 12)


def test_half_is_symmetric_in_value_and_no_jensen_shannon():
    method = load("kl_mixing", lam=0.5)
    ours, swapped = (
        evaluate(method, logits(a), tokens(0), models={"teacher": logits(b)})
        for a, b in ((P_S, P_T), (P_T, P_S))
    )
    assert close(ours.loss, swapped.loss.item(), 12)
    assert close(
        evaluate(load("gkd"), logits(P_S), tokens(0), models={"teacher": logits(P_T)}).loss,
        0.050875,
    )


@pytest.mark.parametrize("arguments", [{}, {"lam": 0.0}, {"lam": 1.0}, {"prefix": "teacher"}])
def test_check(arguments):
    check(load("kl_mixing", **arguments))


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="weights the reverse KL"):
        load("kl_mixing", lam=-0.1)
    with pytest.raises(UserError, match="who writes"):
        load("kl_mixing", prefix="data")
