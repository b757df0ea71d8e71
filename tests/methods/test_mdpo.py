"""MDPO: the optimum of a mirror-descent step, its schedule, and what several updates see of it."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.mdpo import mirror_step
from opdkit.methods.method import load
from opdkit.objective import (
    Advantage,
    Const,
    EntropyBonus,
    LogRatio,
    Objective,
    PolicyGradient,
    Row,
    ToGo,
)
from opdkit.objective.facts import VocabularyFact
from opdkit.testing import check, evaluate
from tests.methods.steps import GROUPS, advantages, agrees, at, step
from tests.methods.toy import close, logits, numbers, tokens

P_K, A = (0.5, 0.3, 0.2), (1.0, -0.5, -1.75)
P_T = (0.2, 0.5, 0.3)


def step_of(now, t, kind="reverse_kl", **facts):
    """Value and gradient [V] in the logits of a mirror-descent step of size t at `now`, on average
    over the token that pi_k drew, which is credited with A; the value with its sign turned.
    """
    value, grad = 0.0, torch.zeros(3, dtype=torch.float64)
    for y, p in enumerate(P_K):
        out = evaluate(
            mirror_step(Row("a"), Const(1 / t), kind),
            logits(now),
            tokens(y),
            before_logits=logits(P_K),
            rows={"a": [A[y]]},
        )
        value, grad = value - p * out.loss, grad + p * out.grad[0, 0]
    return value, grad


def tilted(t):
    """pi_k exp(t A) up to a factor, and that factor's log over t."""
    each = numbers(*P_K) * (t * numbers(*A)).exp()
    return (each / each.sum()).tolist(), each.sum().log().item() / t


@pytest.mark.parametrize(
    ("t", "optimum", "value"),
    [
        (1.0, (0.862478, 0.115467, 0.022055), 0.4547979),
        (0.5, (0.722253, 0.204701, 0.073046), 0.2644643),
    ],
)
def test_the_optimum_of_a_step_and_its_value(t, optimum, value):
    exact, best = tilted(t)
    assert close(numbers(*exact), optimum) and close(numbers(best), value, 7)
    found, grad = step_of(exact, t)
    assert close(found, value, 7) and close(grad, [0, 0, 0], 12)
    for other in (P_K, P_T, (0.9, 0.08, 0.02)):
        assert step_of(other, t)[0] < found


@pytest.mark.parametrize(("t", "where"), [(1e-4, P_K), (30.0, (1.0, 0.0, 0.0))])
def test_small_steps_stay_and_large_ones_are_greedy(t, where):
    exact, _ = tilted(t)
    assert close(numbers(*exact), where, 3) and close(step_of(exact, t)[1], [0, 0, 0], 9)


@pytest.mark.parametrize("kind", ["reverse_kl", "k2", "forward_kl", "jsd"])
def test_where_it_begins_it_is_the_policy_gradient(kind):
    case = step(2, True)
    plain = case.run(Objective(PolicyGradient(Advantage())))
    for t in ("linear", 0.1):
        out = case.run(load("mdpo", kind=kind, t=t).objective)
        assert close(out.terms[1].value, 0.0, 12) and close(out.grad, plain.grad, 12)


def test_the_sampled_form_curves_like_the_kl():
    """The mean of d^2 / 2 has no slope at pi_k and the Fisher matrix as curvature, as the KL."""
    p = numbers(*P_K)
    fisher = p.diag() - p[:, None] * p
    for kind in ("k2", "reverse_kl"):
        rows = []
        for v in range(3):
            moved = []
            for eps in (1e-4, -1e-4):
                now = p.log().clone()
                now[v] += eps
                grad = sum(
                    q
                    * evaluate(
                        mirror_step(Row("a"), Const(1.0), kind),
                        now.view(1, 1, 3),
                        tokens(y),
                        before_logits=logits(P_K),
                        rows={"a": [0.0]},
                    ).grad[0, 0]
                    for y, q in enumerate(P_K)
                )
                moved.append(grad)
            rows.append((moved[0] - moved[1]) / 2e-4)
        assert close(torch.stack(rows), fisher, 6)


@pytest.mark.parametrize(("k", "total", "weight"), [(0, 4, 1.0), (1, 4, 4 / 3), (3, 4, 4.0)])
def test_the_weight_of_the_kl_grows_to_the_number_of_steps(k, total, weight):
    case = step(3, False, step=k, total_steps=total)
    one = case.run(load("mdpo", t=1.0).objective)
    out = case.run(load("mdpo").objective)
    assert close(out.terms[1].value, weight * one.terms[1].value, 12)
    assert close(out.terms[0].value, one.terms[0].value, 12)
    beyond = step(3, False, step=9, total_steps=4)  # a run that takes more steps than it expected
    assert math.isfinite(beyond.run(load("mdpo").objective).loss)


@pytest.mark.parametrize("t", [0.25, 0.5, 1.0])
def test_mirror_descent_opd_steps_geometrically_towards_the_teacher(t):
    """The optimum is pi_k^(1 - t) pi_t^t; a whole step is the teacher."""
    mixed = numbers(*P_K) ** (1 - t) * numbers(*P_T) ** t
    there = (mixed / mixed.sum()).tolist()
    made = load("mdpo", credit="teacher", t=t)
    grad = sum(
        p
        * evaluate(
            made,
            logits(there),
            tokens(y),
            models={"teacher": logits(P_T)},
            before_logits=logits(P_K),
        ).grad[0, 0]
        for y, p in enumerate(P_K)
    )
    assert close(grad, [0, 0, 0], 12)
    assert t < 1 or close(numbers(*there), P_T, 12)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "k2"])
@pytest.mark.parametrize("credit", ["reward", "teacher"])
@pytest.mark.parametrize("offpolicy", [False, True])
def test_it_is_the_naive_formula(offpolicy, credit, kind, fresh):
    case, t, lam = step(6, fresh, step=2, total_steps=5), 0.6, 0.3

    def reference(ls, said):
        y, mask, before = case.tokens, case.mask, said["before"]
        if credit == "reward":
            a = advantages(case.columns["reward"], GROUPS, std=True)[:, None].expand(y.shape)
        else:
            r = torch.where(mask, at(said["teacher"], y) - at(before, y), 0.0)
            a = r.flip(1).cumsum(1).flip(1) if offpolicy else r
        distance = {
            "reverse_kl": (ls.exp() * (ls - before)).sum(-1),
            "forward_kl": (before.exp() * (before - ls)).sum(-1),
            "k2": (at(ls, y) - at(before, y)).square() / 2,
        }[kind]
        each = -a * (at(ls, y) - at(said["sampler"], y)).exp() + distance / t
        if offpolicy:
            each = each + lam * (ls.exp() * before).sum(-1)
        return each[mask].mean()

    made = load("mdpo", offpolicy=offpolicy, credit=credit, kind=kind, lam=lam)
    assert agrees(made, case, reference)


def test_off_policy_at_one_over_t_equal_to_lam_it_is_a_soft_actor():
    """(1/t) log pi + (lam - 1/t) log pi_k - Q loses its middle: -lam H(pi) - Q."""
    case = step(7, False)
    soft = PolicyGradient(Advantage()) + EntropyBonus() * 0.4
    out, same = case.run(load("mdpo", offpolicy=True, t=2.5, lam=0.4).objective), case.run(soft)
    assert close(out.loss, same.loss, 12) and close(out.grad, same.grad, 12)


def test_what_it_reads():
    made = load("mdpo")
    assert VocabularyFact("student") in made.needs.facts and "reward" in made.needs.columns
    assert not load("mdpo", kind="k2").needs.whole("student")
    teacher = load("mdpo", credit="teacher")
    assert "teacher" in teacher.needs.models and "reward" not in teacher.needs.columns
    assert load("mdpo", credit="teacher", offpolicy=True).objective.terms[0].loss.credit == ToGo(
        LogRatio("teacher", "student")
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "k2"},
        {"kind": "jsd", "t": 0.5},
        {"credit": "teacher"},
        {"offpolicy": True},
        {"offpolicy": True, "credit": "teacher", "t": 5},
        {"clip": 0.2},
        {"rollout_cap": 2.0},
    ],
)
def test_check(arguments):
    check(load("mdpo", **arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"t": 0.0}, "a number above 0"),
        ({"t": "cosine"}, "linear"),
        ({"credit": "value"}, "one of reward, teacher"),
        ({"lam": -1.0}, "at least 0"),
        ({"kind": "k3"}, "unknown divergence"),
    ],
)
def test_bad_arguments_are_explained(arguments, words):
    with pytest.raises(UserError, match=words):
        load("mdpo", **arguments)
