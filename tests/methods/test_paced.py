"""PACED: kernel weights of the card, where pass rates come from, and the two stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.methods.paced import Frontier
from opdkit.objective import Batch, Const, Objective
from opdkit.testing import Case, check, evaluate
from tests.methods.toy import P_S, P_T, at_distance, close, logits, numbers

PASSES = (0, 1, 2, 4, 6, 8)  # of 8
LOSSES = (0.9, 0.8, 0.6, 0.5, 0.3, 0.1)
WEIGHTS = (0, 0.893617, 1.531915, 2.042553, 1.531915, 0)


def case(memory=None, **columns):
    """One rollout of one token for each prompt, with the losses above (as reverse KL)."""
    student = numbers(*P_S)
    teacher = torch.stack([at_distance(student, d) for d in LOSSES]).log()[:, None]
    known = {"group": range(6), "reward": [0.0] * 6, **columns} | (
        {"memory:pass_rate": memory} if memory else {}
    )
    return Case(
        torch.zeros(6, 1, dtype=torch.int64),
        student.log().expand(6, 1, 3),
        models={"teacher": teacher},
        columns=known,
    )


@pytest.mark.parametrize(
    ("normalise", "weights", "loss"),
    [("none", [p / 8 * (1 - p / 8) for p in PASSES], 0.38125 / 6), ("mean", WEIGHTS, 0.519149)],
)
def test_weights_from_memory(normalise, weights, loss):
    out = case([p / 8 for p in PASSES]).run(
        load("paced", kind="reverse_kl", normalise=normalise).objective
    )
    assert close(out.terms[0].weight[:, 0], weights) and close(out.loss, loss)
    assert (out.grad[[0, 5]] == 0).all() and (out.grad[1:5] != 0).all()
    assert close(case().run(load("opd", support="full").objective).loss, 0.533333)


def test_weights_from_the_rollouts_of_the_step():
    group = torch.arange(6).repeat_interleave(8)
    correct = torch.cat([torch.arange(8) < n for n in PASSES])
    student, tokens = logits(P_S).expand(48, -1, -1), torch.zeros(48, 1, dtype=torch.int64)
    out = evaluate(
        load("paced"),
        student,
        tokens,
        models={"teacher": logits(P_T).expand(48, -1, -1)},
        group=group,
        correct=correct,
    )
    assert close(out.terms[0].weight[:, 0].view(6, 8), numbers(*WEIGHTS)[:, None].expand(6, 8))
    # equal losses: their weighted mean is theirs
    assert close(out.terms[0].weight.mean(), 1.0, 12) and close(out.loss, 0.193794)


def test_a_prompt_without_memory_is_rated_by_the_step():
    memory = [float("nan"), 0.5, 0.5, 0.5, 0.5, 0.5]
    out = case(memory, group=[0, 0, 1, 1, 1, 1], reward=[1.0, 0.0, 1.0, 1.0, 1.0, 1.0]).run(
        load("paced", normalise="none").objective
    )
    assert (out.terms[0].weight == 0.25).all()
    same = case(memory, group=[0, 0, 1, 1, 1, 1], reward=[1.0] * 6).run(
        load("paced", normalise="none").objective
    )
    assert same.terms[0].weight[:, 0].tolist() == [0, 0.25, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("a", "b", "peak", "height"),
    [(1, 1, 0.5, 0.25), (2, 1, 2 / 3, 0.148148), (1, 2, 1 / 3, 0.148148), (2, 2, 0.5, 0.0625)],
)
def test_kernel(a, b, peak, height):
    def weight(p, a=a, b=b):
        one = Batch(
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 1, dtype=torch.bool),
            dtype=torch.float64,
        )
        return Frontier(Const(p), a, b, "none")(one)[0, 0]

    assert close(weight(peak), height)
    assert weight(peak) > max(weight(peak - 0.01), weight(peak + 0.01))
    assert close(weight(0.3), weight(0.7, b, a).item(), 12)


def test_no_exponents_are_no_weights():
    weighted, plain = (
        case([p / 8 for p in PASSES]).run(m.objective)
        for m in (load("paced", a=0, b=0), load("paced", a=0, b=0, normalise="none"))
    )
    bare = case().run(
        Objective(load("paced").objective.terms[0].loss).terms[0].per("rows") + Objective()
    )
    assert torch.equal(weighted.loss, bare.loss) and torch.equal(plain.grad, bare.grad)


def test_nothing_at_the_frontier_is_zero():
    out = case([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).run(load("paced").objective)
    assert out.loss == 0 and (out.grad == 0).all() and (out.terms[0].weight == 0).all()


def test_rollouts_without_trained_tokens_do_not_dilute_the_mean():
    mask = torch.tensor([[True]] * 4 + [[False]] * 2)
    out = replace(case([0.5, 0.5, 0.25, 0.25, 0.5, 0.5]), mask=mask).run(load("paced").objective)
    assert close(out.terms[0].weight[:4].mean(), 1.0, 12)


def test_two_stages():
    settings = {s: {"step": s, "total_steps": 10} for s in (4, 5)}
    memory = [p / 8 for p in PASSES]
    for step, kind in ((4, "forward_kl"), (5, "reverse_kl")):
        staged = replace(case(memory), settings=settings[step]).run(
            load("paced", two_stage=True).objective
        )
        single = case(memory).run(load("paced", kind=kind).objective)
        assert torch.equal(staged.loss, single.loss) and torch.equal(staged.grad, single.grad)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"two_stage": True}, {"kind": "reverse_kl", "normalise": "none"}, {"a": 2.0, "b": 1.0}],
)
def test_check(arguments):
    check(load("paced", **arguments))


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="must not be negative"):
        load("paced", a=-1.0)
    with pytest.raises(UserError, match="'mean' or 'none'"):
        load("paced", normalise="sum")
