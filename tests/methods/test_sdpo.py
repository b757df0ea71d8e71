"""SDPO: the student's top k with all the rest as one entry, the ratio, what rollouts without
anything to tell cost, and the two teachers.
"""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
from tests.methods.dense import Dense, assert_dense, between, bucketed, renormalised
from tests.methods.own_teacher import followed
from tests.methods.toy import close, expected, logits, numbers, reverse_kl_gradient, tokens

P_S, P_T = (0.5, 0.2, 0.15, 0.1, 0.05), (0.1, 0.6, 0.1, 0.1, 0.1)
S, T = logits(P_S), {"teacher": logits(P_T)}
ALPHAS = (0.0, 0.5, 1.0)
FULL = (0.526992, 0.131865, 0.611159)


def run(y=0, models=T, sampler=None, marks=None, **arguments):
    method = load("sdpo", **{"k": 2, **arguments})
    return evaluate(method, S, tokens(y), models=models, sampler_logits=sampler, marks=marks)


# ------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize(("alpha", "value"), [*zip(ALPHAS, (0.498224, 0.125101, 0.584996))])
def test_the_students_two_best_and_the_rest(alpha, value):
    """(0.5, 0.2, 0.3) against (0.1, 0.6, 0.3)."""
    out = run(alpha=alpha)
    assert close(out.loss, value)
    three, other = (numbers(0.5, 0.2, 0.3).log(), numbers(0.1, 0.6, 0.3).log())
    assert close(out.loss, between(three, other, alpha).item(), 12)


@pytest.mark.parametrize(("alpha", "value"), [*zip(ALPHAS, FULL)])
def test_the_whole_vocabulary(alpha, value):
    assert close(run(alpha=alpha, support="full").loss, value)


@pytest.mark.parametrize(("alpha", "value"), [*zip(ALPHAS, (0.711748, 0.178715, 0.835709))])
def test_renormalised_it_can_exceed_the_whole(alpha, value):
    out = run(alpha=alpha, rest="renormalise")
    assert close(out.loss, value) and out.loss > FULL[ALPHAS.index(alpha)]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_entry_for_the_rest_never_exceeds_the_whole(alpha):
    """Data processing: what cannot be told apart is no further apart."""
    g = torch.Generator().manual_seed(3)
    student, teacher = (2 * torch.randn(1, 50, 9, generator=g).double() for _ in range(2))
    ids = torch.zeros(1, 50).long()
    losses = [
        evaluate(load("sdpo", alpha=alpha, **how), student, ids, models={"teacher": teacher}).loss
        for how in ({"k": 1}, {"k": 3}, {"k": 6}, {"support": "full"})
    ]
    assert losses == sorted(losses) and losses[0] < losses[-1]


@pytest.mark.parametrize(("alpha", "value"), [*zip(ALPHAS, FULL)])
def test_all_entries_leave_nothing(alpha, value):
    top, full = run(alpha=alpha, k=5), run(alpha=alpha, support="full")
    assert close(top.loss, value) and torch.allclose(top.loss, full.loss, rtol=0, atol=1e-6)
    assert torch.allclose(top.grad, full.grad, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------- the ratio


def drawn_from(log_ratio, y=0):
    """A sampler with log pi_s - log pi_sampler = log_ratio at token y."""
    p = P_S[y] * math.exp(-log_ratio)
    rest = (1 - p) / (1 - P_S[y])
    return logits([p if v == y else x * rest for v, x in enumerate(P_S)])


@pytest.mark.parametrize(("cap_ratio", "rho"), [(2.0, 2.0), (math.inf, 2.459603), (2.5, 2.459603)])
def test_the_ratio_and_its_cap(cap_ratio, rho):
    out, fresh = run(sampler=drawn_from(0.9), cap_ratio=cap_ratio), run(cap_ratio=cap_ratio)
    assert close(out.loss / fresh.loss, rho) and close(out.grad, rho * fresh.grad)


def test_a_ratio_below_one_has_no_bound_and_a_fresh_rollout_one_exactly():
    assert close(run(sampler=drawn_from(-1.0, 1), y=1).loss / run(y=1).loss, 0.367879)
    assert run(sampler=S).loss == run().loss and torch.equal(run(sampler=S).grad, run().grad)
    without = between(numbers(0.5, 0.2, 0.3).log(), numbers(0.1, 0.6, 0.3).log(), 0.5)
    assert close(run().loss, without.item(), 12)


def test_the_ratio_is_of_the_student_as_it_is_now():
    """Not of the one before the step: with the sampler as before, one update away."""
    method = load("sdpo", support="full", cap_ratio=math.inf)
    before = drawn_from(0.7)
    out = evaluate(method, S, tokens(0), models=T, before_logits=before)
    assert close(out.loss, math.exp(0.7) * FULL[1], 6)


# ------------------------------------------------------------------------------ nothing to be told


def test_rollouts_without_success_and_feedback():
    """Uninformed altogether: 0, and finite. One of two: the other's own mean."""
    all_of_it = run(marks={"uninformed": torch.ones(1, 1).bool()})
    assert all_of_it.loss == 0 and (all_of_it.grad == 0).all()
    two, teacher = S.expand(2, -1, -1), T["teacher"].expand(2, -1, -1)
    out = evaluate(
        load("sdpo", k=2),
        two,
        torch.zeros(2, 1).long(),
        models={"teacher": teacher},
        marks={"uninformed": torch.tensor([[True], [False]])},
    )
    assert close(out.loss, 0.125101) and (out.grad[0] == 0).all()
    assert out.terms[0].denominator == 1


# --------------------------------------------------------------------------------- the token drawn


@pytest.mark.parametrize("y", range(5))
def test_the_token_that_was_drawn(y):
    """The policy gradient of A = log pi_t - log pi_s."""
    out = run(y, alpha=1.0, support="sampled")
    credit = math.log(P_T[y] / P_S[y])
    push = torch.eye(5).double()[y] - numbers(*P_S)
    assert close(out.terms[0].credit, [[credit]], 12)
    assert close(out.grad[0, 0], -credit * push, 12)
    capped = run(y, alpha=1.0, support="sampled", sampler=drawn_from(0.9, y))
    assert close(capped.grad[0, 0], -2 * credit * push, 12)


def test_in_expectation_it_is_the_reverse_kl():
    mean = expected(load("sdpo", alpha=1.0, support="sampled"), P_S, P_T)
    assert close(mean, reverse_kl_gradient(P_S, P_T), 12)
    assert close(mean, run(alpha=1.0, support="full").grad[0, 0], 12)


# ------------------------------------------------------------------------------------- the teachers


def test_an_average():
    teacher = load("sdpo").models["teacher"]
    assert teacher["view"] == "peer_or_feedback"
    # 0.95 * 1 + 0.05 * 2, then 0.95 * 1.05 + 0.05 * 3
    seen = followed(teacher, (1.0, 2.0, 3.0))
    assert seen == pytest.approx([1.0, 1.05, 1.1475], abs=1e-12)


def test_a_trust_region():
    assert load("sdpo", teacher="trust_region").models["teacher"] == {
        "kind": "mixture",
        "form": "geometric",
        "of": {
            "start": {"kind": "self", "weights": "fixed"},
            "now": {"kind": "self", "weights": "live"},
        },
        "weights": {"start": 0.95, "now": 0.05},
        "view": "peer_or_feedback",
    }


@pytest.mark.parametrize(("rate", "start", "now"), [(0.0, 1.0, 0.0), (1.0, 0.0, 1.0)])
def test_its_ends_are_the_frozen_and_the_live_student(rate, start, now):
    """Weights of the geometric mixture, whose logits are (1 - rate) start + rate now: at 1 the
    student as it is, which teaches nothing where the context says nothing.
    """
    weights = load("sdpo", teacher="trust_region", rate=rate).models["teacher"]["weights"]
    assert weights == {"start": start, "now": now}
    mixed = weights["start"] * T["teacher"] + weights["now"] * S
    out = run(models={"teacher": mixed}, support="full")
    assert close(out.loss, FULL[1] if rate == 0 else 0.0) and (out.grad == 0).all() == (rate == 1)


# --------------------------------------------------------------------------------------- reference


def weighed(d: Dense, value):  # [], of [B, T]
    rho = (d.at(d.student).detach() - d.at(d.sampler)).clamp(-20, 20).exp().clamp(max=2.0)
    kept = d.mask & ~d.noted
    return (rho * value)[kept].sum() / kept.sum()


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("support", ["tail", "renormalise", "full"])
def test_the_naive_form(alpha, support, off_policy):
    restricted = {"tail": bucketed, "renormalise": renormalised}

    def formula(d: Dense):  # []
        both = (d.student, d.teacher)
        if support != "full":
            both = restricted[support](*both, d.before.topk(3).indices)
        return weighed(d, between(*both, alpha))

    how = {"support": "full"} if support == "full" else {"k": 3, "rest": support}
    assert_dense(load("sdpo", alpha=alpha, **how), formula, off_policy, "uninformed")


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_naive_form_at_the_sampled_token(off_policy):
    def formula(d: Dense):  # []
        credit = d.at(d.teacher) - d.at(d.before)
        return weighed(d, -credit * d.at(d.student))

    method = load("sdpo", alpha=1.0, support="sampled")
    assert_dense(method, formula, off_policy, "uninformed")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"rest": "renormalise"},
        {"support": "full"},
        {"support": "sampled", "alpha": 1.0},
        {"teacher": "trust_region"},
    ],
)
def test_check(arguments):
    check(load("sdpo", **arguments))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"alpha": 1.5}, "0 is forward KL, 1 reverse KL"),
        ({"rate": -0.1}, "share of the student that the teacher takes over"),
        ({"cap_ratio": 0}, "largest weight of a token"),
        ({"rest": "raw"}, "must be one of tail, renormalise"),
        ({"support": "teacher"}, "must be one of top, full, sampled"),
        ({"support": "sampled"}, "shows reverse KL alone"),
        ({"teacher": "fixed"}, "must be one of ema, trust_region"),
        ({"k": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_explained(wrong, said):
    with pytest.raises(UserError, match=said):
        load("sdpo", **wrong)
