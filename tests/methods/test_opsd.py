"""OPSD: the divergence, its cap entry by entry, the forms on part of the vocabulary, and whose
weights teach.
"""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
from tests.methods.dense import Dense, assert_dense, between, renormalised
from tests.methods.own_teacher import followed
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


def run(y=0, student=S, models=T, **arguments):
    return evaluate(load("opsd", **arguments), student, tokens(y), models=models)


# --------------------------------------------------------------------------------- the divergence


@pytest.mark.parametrize(
    ("beta", "value", "gradient"),
    [
        (0.0, 0.193794, (0.3, -0.2, -0.1)),
        (1.0, 0.223805, (0.346243, -0.220389, -0.125854)),
        (0.5, 0.050875, (0.077318, -0.050263, -0.027055)),
        (0.1, 0.017563, None),
        (0.9, 0.019661, None),
    ],
)
@pytest.mark.parametrize("cap", [None, float("inf")])
def test_without_a_cap(beta, value, gradient, cap):
    out = run(beta=beta, cap=cap)
    assert close(out.loss, value)
    assert gradient is None or close(out.grad[0, 0], gradient)


def test_near_the_ends_it_vanishes_in_proportion():
    """D / beta and D / (1 - beta) tend to the two KLs, the error as beta does."""
    forward, reverse = run(beta=0.0, cap=None).loss, run(beta=1.0, cap=None).loss
    small = 1e-6
    assert close(run(beta=small, cap=None).loss / small, forward.item(), 5)
    assert close(run(beta=1 - small, cap=None).loss / small, reverse.item(), 5)


# ----------------------------------------------------------------------------------------- its cap


def test_the_cap_is_an_upper_one_of_each_entry():
    """Entries -0.183258, 0.255413, 0.121640 of forward KL: the first stays, the others are 0.05."""
    entries = numbers(*P_T) * (numbers(*P_T) / numbers(*P_S)).log()
    assert close(entries, (-0.183258, 0.255413, 0.121640))
    out = run()
    assert close(out.loss, -0.083258)  # negative is legal


def test_what_is_capped_does_not_pull_and_the_push_turns_around():
    """Only -0.2 log p_s(0) has a gradient: 0.2 (p_s - e_0) = (-0.1, 0.06, 0.04)."""
    assert close(run().grad[0, 0], (-0.1, 0.06, 0.04))
    assert (run().grad * run(cap=None).grad < 0).all()


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 0.9])
def test_between_the_ends_the_cap_bounds_the_sum_of_both_parts(beta):
    p, q = numbers(*P_S), numbers(*P_T)
    m = beta * q + (1 - beta) * p
    entries = beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
    cap = (entries.max() / 2).item()
    assert close(run(beta=beta, cap=cap).loss, entries.clamp(max=cap).sum().item(), 12)
    assert (entries > cap).any() and (entries < cap).any()


def test_a_cap_below_which_nothing_is_left_trains_nothing():
    """The smallest entry of beta 0.5 here is 0.0063: a cap below it leaves no gradient at all."""
    out = run(beta=0.5, cap=1e-9)
    assert close(out.loss, 3e-9, 12) and (out.grad == 0).all()


# ------------------------------------------------------------------------------------- other forms


def test_the_token_that_was_drawn():
    out = run(1, support="sampled")
    assert close(out.terms[0].credit, [[0.510826]])
    assert close(out.grad[0, 0], (0.255413, -0.357578, 0.102165))
    mean = expected(load("opsd", support="sampled"), P_S, P_T)
    assert close(mean, run(beta=1.0, cap=None).grad[0, 0], 12)
    assert close(mean, reverse_kl_gradient(P_S, P_T), 12)


def test_the_teachers_top_two_renormalised():
    """(0.5, 0.3) / 0.8 against (0.3, 0.2) / 0.5: 0.625 log(0.625 / 0.6) + 0.375 log(0.375 / 0.4);
    what is outside has no gradient.
    """
    out = run(k=2)
    assert close(out.loss, 0.001312) and close(out.grad[0, 0], (0.0, -0.025, 0.025))
    # its first entry is 0.025514: capped at 0.01, the other is left, -0.024202
    capped = run(k=2, cap=0.01)
    assert close(capped.loss, 0.01 - 0.024202)
    assert close(capped.grad[0, 0], (0.0, 0.225, -0.225), 12)  # 0.375 (p_s - e_2), p_s(1) = 0.6


# --------------------------------------------------------------------------------------- teachers


def test_the_same_context_and_live_weights_teach_nothing():
    g = torch.Generator().manual_seed(1)
    student = torch.randn(2, 4, 6, generator=g, dtype=torch.float64)
    ids = torch.randint(6, (2, 4), generator=g)
    for arguments in ({}, {"beta": 0.5}, {"beta": 1.0}, {"k": 3}, {"support": "sampled"}):
        method = load("opsd", teacher="live", **arguments)
        out = evaluate(method, student, ids, models={"teacher": student})
        assert close(out.loss, 0.0, 12) and (out.grad == 0).all()


def test_masked_positions_have_no_gradient():
    g = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(2, 4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    out = evaluate(
        load("opsd"), student, torch.zeros(2, 4).long(), mask, models={"teacher": teacher}
    )
    assert (out.grad[~mask] == 0).all() and out.terms[0].denominator == 3
    assert (out.grad[mask].abs().sum(-1) > 0).all()


def test_which_weights_read_the_solution():
    own = {"kind": "self", "view": "solution"}
    assert load("opsd").models == {"teacher": own | {"weights": "fixed"}}
    assert load("opsd", teacher="live").models == {"teacher": own | {"weights": "live"}}
    average = {"weights": "ema", "rate": 0.001, "first_copy": True}
    assert load("opsd", teacher="ema").models == {"teacher": own | average}


def test_the_average_first_becomes_the_student():
    """Students 0, 1, 2, 2: the first step only copies, then 0.999 * 1 + 0.001 * 2 = 1.001."""
    teacher = load("opsd", teacher="ema").models["teacher"]
    seen = followed(teacher, (0.0, 1.0, 2.0, 2.0))
    assert seen == pytest.approx([0.0, 1.0, 1.001, 0.999 * 1.001 + 0.002], abs=1e-12)
    assert seen[1] == 1.0


# --------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("cap", [0.05, None])
def test_the_naive_form(beta, cap, off_policy):
    def formula(d: Dense):  # []
        return between(d.student, d.teacher, beta, cap)[d.mask].sum() / d.mask.sum()

    assert_dense(load("opsd", beta=beta, cap=cap), formula, off_policy)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_naive_form_on_the_teachers_top_k(beta, off_policy):
    def formula(d: Dense):  # []
        both = renormalised(d.student, d.teacher, d.teacher.topk(4).indices)
        return between(*both, beta, 0.05)[d.mask].sum() / d.mask.sum()

    assert_dense(load("opsd", beta=beta, k=4), formula, off_policy)


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_naive_form_at_the_sampled_token(off_policy):
    def formula(d: Dense):  # []
        credit = d.at(d.teacher) - d.at(d.before)
        ratio = (d.at(d.student) - d.at(d.sampler)).exp()
        return -(ratio * credit)[d.mask].sum() / d.mask.sum()

    assert_dense(load("opsd", support="sampled"), formula, off_policy)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"cap": None},
        {"beta": 0.5},
        {"beta": 1.0},
        {"k": 50},
        {"support": "sampled"},
        {"teacher": "ema"},
        {"teacher": "live"},
    ],
)
def test_check(arguments):
    check(load("opsd", **arguments))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"beta": 1.5}, "0 is forward KL, 1 reverse KL"),
        ({"cap": 0.0}, "cap=None is no bound"),
        ({"decay": -0.1}, "share of the teacher's average that stays"),
        ({"teacher": "frozen"}, "must be one of fixed, ema, live"),
        ({"support": "top"}, "must be one of full, sampled"),
        ({"support": "sampled", "k": 5}, "leave one of them out"),
    ],
)
def test_bad_arguments_are_explained(wrong, said):
    with pytest.raises(UserError, match=said):
        load("opsd", **wrong)
