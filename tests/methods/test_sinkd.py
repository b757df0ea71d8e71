"""SinKD: the card's transport, its limits, and the exact gradient of the whole step's distance
however the step is cut.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.methods.sinkd import Transport, everywhere, sinkhorn, transported
from opdkit.objective import Const, Entropy, Objective, RatioWeighted
from opdkit.objective.kernels.pairwise import distances, pulls
from opdkit.testing import Case, check, evaluate
from opdkit.testing.fabricate import fabricate
from tests.methods.made_up import MadeUp, assert_dense
from tests.methods.steps import step
from tests.methods.toy import close, logits, numbers, tokens

P, Q = ((0.9, 0.1), (0.2, 0.8)), ((0.8, 0.2), (0.3, 0.7))


def distance(student, teacher, eps=0.1, **arguments):
    """SD of distributions, which are so many tokens of one rollout, and the evaluation."""
    objective = Objective(Transport(1.0, eps, **arguments))
    out = evaluate(
        objective,
        logits(*student),
        tokens(*[0] * len(student)),
        models={"teacher": logits(*teacher)},
    )
    return out.loss * len(student), out


def plan_of(cost: Tensor, eps: float, iterations: int = 20) -> Tensor:
    """[M, M]: the definition: rows and columns divided by their sums by turns."""
    plan = (-cost / eps).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan


def test_the_card():
    p, q = numbers(*P[0], *P[1]).view(2, 2), numbers(*Q[0], *Q[1]).view(2, 2)
    cost = distances(p, q)
    assert close(cost, [[0.2, 1.2], [1.2, 0.2]], 12)
    plan = transported(cost / 0.1, *sinkhorn(cost / 0.1, 20)[-1])
    assert close(plan, [[0.999955, 0.000045], [0.000045, 0.999955]])
    assert close(distance(P, Q)[0], 0.400091)


def test_nothing_ties_a_student_to_its_own_teacher():
    """The teacher's rows, or the student's, in another order: the same distance."""
    assert close(distance(P, Q[::-1])[0], 0.400091) and close(distance(P[::-1], Q)[0], 0.400091)
    kl = Objective(load("sinkd").objective.terms[0])
    apart = [evaluate(kl, logits(*P), tokens(0, 0), models={"teacher": logits(*q)}).loss
             for q in (Q, Q[::-1])]  # fmt: skip
    assert apart[1] > 5 * apart[0]


def test_columns_sum_to_one_and_rows_nearly():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 9, 6, generator=g, dtype=torch.float64).softmax(-1)
    cost = distances(p, q)
    assert (cost >= 0).all() and (cost <= 2).all()
    plan = transported(cost / 0.1, *sinkhorn(cost / 0.1, 20)[-1])
    assert close(plan, plan_of(cost, 0.1), 12)
    assert close(plan.sum(0), torch.ones(9), 12)
    assert 1e-12 < (plan.sum(1) - 1).abs().max() < 0.1 and close(plan.sum(), 9.0, 12)


def test_of_one_token_it_is_the_l1_distance():
    p, q = numbers(0.5, 0.3, 0.2), numbers(0.2, 0.5, 0.3)
    value, out = distance([p.tolist()], [q.tolist()])
    assert close(value, 0.6, 12)  # twice the total variation
    sign = (p - q).sign()
    assert close(out.grad[0, 0], p * (sign - (p * sign).sum()), 12)


def test_a_flat_plan_averages_over_all_pairs():
    g = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 5, 4, generator=g, dtype=torch.float64).softmax(-1)
    mean = (p[:, None] - q[None]).abs().sum(-1).mean()
    assert close(distance(p.tolist(), q.tolist(), eps=1e9)[0], 5 * mean, 8)


def test_well_separated_models_that_agree_are_nearly_at_no_distance():
    sharp = ((0.98, 0.01, 0.01), (0.01, 0.98, 0.01), (0.01, 0.01, 0.98))
    wide, narrow = (distance(sharp, sharp, eps)[0] for eps in (0.5, 0.05))
    assert 0 < narrow < 1e-12 < wide < 0.5  # not exactly 0: it is not debiased


def test_a_small_eps_stays_finite():
    """exp(-1.2 / 1e-4) is no number that is not 0."""
    value, out = distance(P, Q, eps=1e-4)
    assert close(value, 0.4, 8) and out.grad.isfinite().all()


def settled(settings):
    return {
        "temperature": 2.0, "eps": 0.1, "iterations": 20, "mix": 0.0256, "detach": False
    } | settings  # fmt: skip


def softened(x: Tensor, temperature: float) -> Tensor:
    """[..., V]: log-probs of log-probs [..., V] over a temperature."""
    return (x / temperature).log_softmax(-1)


def dense_distance(s: Tensor, t: Tensor, settings: dict, weight: Tensor | None = None) -> Tensor:
    """[]: SD of softened log-probs [N, V], the rows' costs times `weight` [N], by autograd."""
    cost = (s.exp()[:, None] - t.exp()[None]).abs().sum(-1)
    plan = plan_of(cost, settings["eps"], settings["iterations"])
    each = ((plan.detach() if settings["detach"] else plan) * cost).sum(1)
    return (each if weight is None else weight * each).sum()


@pytest.mark.parametrize(
    "arguments",
    [
        {"mix": 1.0},
        {"mix": 2.0, "temperature": 1.0, "eps": 0.3, "iterations": 3},
        {"mix": 1.0, "detach": True},
        {"mix": 0.0},
        {},
    ],
)
def test_the_naive_form(arguments):
    settings = settled(arguments)

    def formula(d: MadeUp) -> Tensor:  # []
        s, t = (softened(d[m][d.mask], settings["temperature"]) for m in ("student", "teacher"))
        kl = (t.exp() * (t - s)).sum(-1)
        return (kl.sum() + settings["mix"] * dense_distance(s, t, settings)) / len(s)

    assert_dense(load("sinkd", **arguments), formula)


def dense(
    case: Case, sets: list[list[int]], settings: dict, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss [] and gradient [B, T, V] of mix SD over these sets of flat positions, per token."""
    leaf = case.student.clone().requires_grad_()
    s = softened(leaf, settings["temperature"]).flatten(0, 1)
    t = softened(case.models["teacher"], settings["temperature"]).flatten(0, 1)
    parts = [dense_distance(s[at], t[at], settings, weight.flatten()[at]) for at in sets]
    loss = settings["mix"] * sum(parts) / case.mask.sum()  # type: ignore[union-attr]
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def only_transport(**arguments) -> Objective:
    return Objective(load("sinkd", **arguments).objective.terms[1])


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("items", [1, 4, 7])
def test_sets_cover_the_step_and_each_is_exact(items, fresh):
    objective, case = only_transport(items=items, mix=1.0), step(5, fresh)
    loss: Transport = objective.terms[0].loss
    at = case.mask.flatten().nonzero()[:, 0]
    sets = [part.tolist() for part in loss.sets(at, case.batch(objective))]
    assert sorted(i for part in sets for i in part) == at.tolist()
    assert max(map(len, sets)) <= items and max(map(len, sets)) - min(map(len, sets)) <= 1
    expected = dense(case, sets, settled({"mix": 1.0}), torch.ones_like(case.mask).double())
    for parts in (None, [[0, 3], [1, 4], [2, 5]], [[i] for i in range(6)]):
        out = case.run(objective, parts=parts, chunk=3)
        assert close(out.loss, expected[0], 10) and close(out.grad, expected[1], 10)


def test_sets_are_neighbours_of_few_rollouts_in_an_order_that_steps_change():
    loss, case = Transport(items=5), step(5, True)
    at = case.mask.flatten().nonzero()[:, 0]
    orders = set()
    for number in range(8):
        batch = replace(case, settings={"step": number}).batch(Objective(loss))
        sets = loss.sets(at, batch)
        assert all(len((part // 5).unique()) <= 4 for part in sets)
        rows = torch.cat(sets) // 5
        assert rows.unique_consecutive().numel() == len(rows.unique())  # a rollout stays together
        orders.add(tuple(rows.unique_consecutive().tolist()))
    assert len(orders) > 4


def test_an_optimiser_step_compares_its_own_rollouts_alone():
    objective, case = only_transport(mix=1.0), step(6, False)
    inside = case.mask.clone()
    inside[:3] = False
    at = inside.flatten().nonzero()[:, 0].tolist()
    part = replace(case, mask=inside)
    expected = dense(part, [at], settled({"mix": 1.0}), torch.ones_like(inside).double())
    out = case.run(objective, rows=[3, 4, 5], parts=[[4], [5, 3]])
    assert close(out.loss, expected[0], 10) and close(out.grad, expected[1], 10)


def test_a_weight_per_token_weighs_the_rows_of_the_plan_and_a_zero_takes_the_token_out():
    case, h = step(7, False), Entropy("teacher")
    t = case.models["teacher"].log_softmax(-1)
    weight = -(t.exp() * t).sum(-1)
    weight = weight * (weight > 1.6)
    at = (case.mask & (weight != 0)).flatten().nonzero()[:, 0].tolist()
    assert 3 < len(at) < case.mask.sum() - 3
    expected = dense(case, [at], settled({"mix": 1.0}), weight)
    weighed = Objective(Transport() * h * (h > 1.6))
    for parts in (None, [[0, 1, 5], [2, 3, 4]]):
        out = case.run(weighed, parts=parts, chunk=2)
        assert close(out.loss, expected[0], 10) and close(out.grad, expected[1], 10)


def test_masked_tokens_are_no_part_of_it():
    """As if they were not there: a row of zeros would attract mass."""
    case = step(0, True)
    out = case.run(only_transport())
    assert (out.grad[~case.mask] == 0).all()
    moved = case.models["teacher"].clone()
    moved[~case.mask] += 5.0 * torch.randn_like(moved[~case.mask])
    other = replace(case, models={"teacher": moved}).run(only_transport())
    assert torch.equal(out.grad, other.grad)


def test_a_loss_around_it_is_prepared_as_it_is():
    case = step(1, True)  # fresh: the ratio is 1 everywhere
    bare = case.run(Objective(Transport()), parts=[[0, 1, 2], [3, 4, 5]])
    around = case.run(Objective(RatioWeighted(Transport())), parts=[[0, 1, 2], [3, 4, 5]])
    assert close(around.grad, bare.grad, 12) and bare.grad.abs().max() > 1e-3


def test_tiles_of_pairs_are_the_pairs():
    g = torch.Generator().manual_seed(2)
    p, q = (torch.rand(n, 200, generator=g, dtype=torch.float64) for n in (130, 70))
    weight = torch.randn(130, 70, generator=g, dtype=torch.float64)
    apart = p[:, None] - q[None]
    assert close(distances(p, q), apart.abs().sum(-1), 10)
    assert close(pulls(p, q, weight), (weight[..., None] * apart.sign()).sum(1), 10)


def test_equal_entries_have_no_slope():
    p = numbers(0.5, 0.25, 0.25)[None]
    assert (pulls(p, p, torch.ones(1, 1).double()) == 0).all()


def test_a_teacher_of_several_models_cannot_be_sent_between_processes():
    class Several:
        def logits(self, positions):
            raise AssertionError

    case = fabricate(load("sinkd").objective)
    batch = case.batch(load("sinkd").objective)
    batch.sources["teacher"] = Several()
    assert everywhere(batch, "teacher") is batch.sources["teacher"]
    batch.whole = lambda x: x
    with pytest.raises(UserError, match="put together from several models"):
        everywhere(batch, "teacher")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"items": 4, "mix": 1.0}, {"detach": True, "eps": 0.01}, {"mix": 0.0}, {"iterations": 1}],
)
def test_check(arguments):
    check(load("sinkd", **arguments))


def test_without_transport_the_live_student_is_not_read_before_the_step():
    assert load("sinkd").needs.kept("live") and not load("sinkd", mix=0.0).needs.of("live")
    assert str(Objective(Transport() * Const(2))) == "Transport() * 2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temperature": 0.0}, "must be positive"),
        ({"eps": -0.1}, "must be positive"),
        ({"iterations": 0}, "at least 1"),
        ({"items": 0}, "at least 1"),
        ({"mix": -1.0}, "at least 0"),
    ],
)
def test_bad_arguments_are_explained(arguments, said):
    with pytest.raises(UserError, match=said):
        load("sinkd", **arguments)
