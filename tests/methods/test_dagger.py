"""DAgger: the teacher's whole distribution on the student's prefixes, and what is mixed in."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.curricula import Plain
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
from tests.methods.dense import Dense, assert_dense, between, bucketed
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens

S, T = logits(P_S), {"teacher": logits(P_T)}


def run(student=S, models=T, **arguments):
    return evaluate(load("dagger", **arguments), student, tokens(0), models=models)


@pytest.mark.parametrize(
    ("mix", "value", "gradient"),
    [
        (0.0, 0.193794, (0.3, -0.2, -0.1)),
        (0.25, 0.201297, (0.311561, -0.205097, -0.106463)),
        (0.5, 0.208799, (0.323122, -0.210195, -0.112927)),
        (1.0, 0.223805, (0.346243, -0.220389, -0.125854)),
    ],
)
def test_the_corner_and_what_is_mixed_in(mix, value, gradient):
    out = run(mix=mix)
    assert close(out.loss, value) and close(out.grad[0, 0], gradient)
    corner, other = run(mix=0.0), run(mix=1.0)
    for a, b, c in ((corner.loss, other.loss, out.loss), (corner.grad, other.grad, out.grad)):
        assert close(c, (1 - mix) * a + mix * b, 12)  # affine in mix


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_it_is_kl_mixing_under_another_name(lam):
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=g).double() for _ in range(2))
    ids = torch.randint(7, (2, 5), generator=g)
    ours, theirs = (
        evaluate(method, student, ids, models={"teacher": teacher})
        for method in (load("dagger", mix=lam), load("kl_mixing", lam=lam))
    )
    assert close(ours.loss, theirs.loss.item(), 12) and close(ours.grad, theirs.grad, 12)


def test_the_student_writes():
    assert load("dagger").curriculum == Plain()


# prefix -> P(1)
STUDENT = {(): 0.5, (0,): 0.5, (1,): torch.tensor(0.5, dtype=torch.float64).sigmoid().item()}
TEACHER = {(): 0.7, (0,): 0.4, (1,): 0.9}


def at(prefix, **arguments):
    """The loss at one prefix."""
    s, t = (logits((1 - p[prefix], p[prefix])) for p in (STUDENT, TEACHER))
    return run(s, {"teacher": t}, **arguments).loss


@pytest.mark.parametrize(("mix", "value"), [(0.0, 0.191848), (1.0, 0.233410)])
def test_over_the_students_prefixes_only_the_reverse_direction_is_a_sequence_kl(mix, value):
    loss = at((), mix=mix)
    loss = loss + sum((STUDENT[()] if a else 1 - STUDENT[()]) * at((a,), mix=mix) for a in (0, 1))
    assert close(loss, value)

    def chance(model, a, b):
        return (model[()] if a else 1 - model[()]) * (model[a,] if b else 1 - model[a,])

    pairs = list(itertools.product((0, 1), repeat=2))
    s, t = (numbers(*(chance(model, *pair) for pair in pairs)) for model in (STUDENT, TEACHER))
    forward, reverse = ((p * (p / q).log()).sum().item() for p, q in ((t, s), (s, t)))
    assert close(loss, reverse, 9) == (mix == 1) and not close(loss, forward, 6)


@pytest.mark.parametrize("arguments", [{}, {"mix": 0.25}, {"mix": 1.0}, {"k": 2}])
def test_agreement_is_zero(arguments):
    out = run(models={"teacher": S}, **arguments)
    assert close(out.loss, 0.0, 12) and close(out.grad, torch.zeros(1, 1, 3), 12)


def test_half_is_half_the_jeffreys_divergence():
    """Symmetric in value, and no Jensen-Shannon divergence (0.050875)."""
    swapped = run(logits(P_T), {"teacher": S}, mix=0.5)
    assert close(run(mix=0.5).loss, swapped.loss.item(), 12)
    assert close(run(kind="jsd").loss, 0.050875)


def test_the_teachers_top_k_and_the_rest():
    """(0.5, 0.5) of the teacher's best and the rest against (0.3, 0.7): log 0.5 / sqrt(0.21); no
    more than the whole, and the whole where k is all.
    """
    best = 0.5 * math.log(0.25 / 0.21)
    assert close(run(k=1).loss, best, 12)
    assert run(k=1).loss < run().loss
    for k in (2, 3):  # one entry is left, or none
        assert torch.allclose(run(k=k).loss, run().loss, rtol=0, atol=1e-7)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("mix", [0.0, 0.25])
@pytest.mark.parametrize("k", [None, 4])
def test_the_naive_form(mix, k, off_policy):
    def formula(d: Dense):  # []
        both = (d.student, d.teacher)
        if k is not None:
            both = bucketed(*both, d.teacher.topk(k).indices)
        value = (1 - mix) * between(*both, 0.0) + mix * between(*both, 1.0)
        return value[d.mask].sum() / d.mask.sum()

    assert_dense(load("dagger", mix=mix, k=k), formula, off_policy)


@pytest.mark.parametrize(
    "arguments", [{}, {"k": 8}, {"mix": 0.25}, {"mix": 1.0}, {"kind": "jsd"}, {"kind": "tv"}]
)
def test_check(arguments):
    check(load("dagger", **arguments))


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="weight of the reverse KL"):
        load("dagger", mix=1.2)
    with pytest.raises(UserError, match="unknown divergence 'forward'"):
        load("dagger", kind="forward")
