"""Drift gating: gates of the card, blocks, the base left as it is where nothing has drifted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.drift_gating import Blocks
from opdkit.methods.method import load
from opdkit.objective import Batch, ColumnFact, Mark, Objective, RolloutLoss, TokenLoss
from opdkit.testing import check, evaluate
from tests.methods.toy import P_S, P_T, binary, close, logits

DRIFT = (0.1, 0.3, -0.2, -0.2, 0.05, -0.6)


@dataclass(frozen=True)
class Counted(TokenLoss):
    """1, 2, 3 ... by position, with the gradient of that times log pi_s."""

    def value(self, live):
        return (live.positions + 1) * (1 + live.logp - live.logp.detach())


def run(method, drift=DRIFT, mask=None):
    base = math.log(0.3)
    student, sampler = binary([base + d for d in drift]), binary([base] * len(drift))
    tokens = torch.zeros(1, len(drift), dtype=torch.int64)
    return evaluate(
        method,
        student,
        tokens,
        mask,
        models={"teacher": binary([-2.0] * len(drift))},
        sampler_logits=sampler,
    )


def test_gates_of_blocks_of_two():
    out = run(load("drift_gating", base=Objective(Counted()), block=2))
    assert close(out.terms[0].weight, [[1.024680] * 4 + [0.950640] * 2])
    assert close(out.terms[0].weight.mean(), 1.0, 12)
    assert close(out.loss, 3.450640)
    assert close(run(Objective(Counted())).loss, 3.5, 12)


def test_masked_tokens_enter_neither_block_nor_mean():
    mask = torch.tensor([[True] * 5 + [False]])
    out = run(load("drift_gating", base=Objective(Counted()), block=2), mask=mask)
    assert close(out.terms[0].weight, [[0.968648] * 4 + [1.125408, 0]])
    assert close(out.loss, 3.062704) and (out.grad[0, 5] == 0).all()


@pytest.mark.parametrize("base", ["opd", "topk_opd", "iw_opd", "gkd", "eopd"])
def test_without_drift_or_tau_it_is_the_base(base):
    for drift, tau in (((0.0,) * 6, 1.0), (DRIFT, 0.0)):
        ours, plain = run(load("drift_gating", base=base, tau=tau), drift), run(load(base), drift)
        assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.grad, plain.grad)


def test_the_gate_has_no_gradient():
    ours, plain = run(load("drift_gating", block=2)), run(load("opd"))
    assert close(ours.grad, ours.terms[0].weight[..., None] * plain.grad, 12) and not close(
        ours.grad, plain.grad, 3
    )


def test_signed_means():
    cancel = run(load("drift_gating", block=2), (0.4, -0.4, 0.1, 0.1))  # gates 1 and exp(-0.1)
    assert close(
        cancel.terms[0].weight, [[2 / (1 + math.exp(-0.1))] * 2 + [2 / (1 + math.exp(0.1))] * 2], 12
    )
    flipped = run(load("drift_gating", block=2), tuple(-d for d in DRIFT))
    assert close(flipped.terms[0].weight, run(load("drift_gating", block=2)).terms[0].weight, 12)
    equal = run(load("drift_gating", block=2), (0.3, 0.3, -0.3, -0.3))
    assert close(equal.terms[0].weight, torch.ones(1, 4), 12)


def test_block_of_one_and_of_the_whole_response():
    each = run(load("drift_gating", block=1)).terms[0].weight[0]
    wanted = torch.tensor([math.exp(-abs(d)) for d in DRIFT], dtype=torch.float64)
    assert close(each, wanted / wanted.mean(), 12)
    # one gate: its own mean
    assert close(run(load("drift_gating", block=6)).terms[0].weight, torch.ones(1, 6), 12)


def test_every_term_of_the_base_keeps_its_weight_and_denominator():
    base, gated = load("scope"), load("drift_gating", base="scope")
    assert (
        [t.denominator for t in gated.objective.terms]
        == [t.denominator for t in base.objective.terms]
        == ["own", "tokens"]
    )
    assert load("drift_gating", base="tropd").curriculum == load("tropd").curriculum
    assert (
        load("drift_gating", base=load("kl_mixing", prefix="teacher")).curriculum.student_share == 0
    )
    assert (
        load("drift_gating", clip=(0.2, 0.2)).objective.terms[0].loss
        == load("opd", clip=(0.2, 0.2)).objective.terms[0].loss
    )


def blocks(signal, width, newlines=()):
    marked = torch.zeros(1, width, dtype=torch.bool)
    marked[0, list(newlines)] = True
    ones = torch.ones(1, width, dtype=torch.bool)
    return signal(
        Batch(torch.zeros(1, width, dtype=torch.int64), ones, {ColumnFact("mark:newline"): marked})
    )[0].tolist()


def test_blocks():
    lines = Blocks(8, Mark("newline"))
    assert blocks(Blocks(3), 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert blocks(lines, 9) == blocks(Blocks(8), 9) == [0] * 8 + [1]  # no newline: fixed length
    assert blocks(lines, 7, [2, 4]) == [0, 0, 0, 1, 1, 2, 2]  # a block ends with its newline
    # spans of 1 are short: each joins the next
    assert blocks(lines, 7, [0, 1, 2]) == [0, 0, 1, 1, 1, 1, 1]
    # a span of 10 is split into 8 and 2
    assert blocks(lines, 14, [9, 11]) == [0] * 8 + [1, 1, 2, 2, 3, 3]
    assert blocks(lines, 12, [2, 11]) == [0] * 3 + [1] * 8 + [2]
    for width in range(1, 30):
        assert (
            blocks(lines, width, [n for n in (3, 4, 20) if n < width])
            == blocks(lines, 30, [3, 4, 20])[:width]
        )


def test_newlines_shape_the_gates():
    student, sampler = binary([-1.0] * 4), binary([-1.4, -1.0, -1.0, -1.0])
    tokens, teacher = torch.zeros(1, 4, dtype=torch.int64), {"teacher": binary([-2.0] * 4)}
    marks = {"newline": [[False, True, False, False]]}
    method = load("drift_gating", spans="newline", block=4)
    out = evaluate(method, student, tokens, models=teacher, sampler_logits=sampler, marks=marks)
    gate = math.exp(-0.2)
    assert close(out.terms[0].weight, [[2 * gate / (1 + gate)] * 2 + [2 / (1 + gate)] * 2], 12)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"block": 2},
        {"spans": "newline", "block": 3},
        {"base": "topk_opd", "block": 2},
        {"base": "tropd", "clip": (0.2, 0.2)},
    ],
)
def test_check(arguments):
    check(load("drift_gating", **arguments))


def test_fresh_rollouts_have_gates_of_one():
    student = logits(P_S, P_S)
    out = evaluate(
        load("drift_gating"), student, torch.tensor([[0, 1]]), models={"teacher": logits(P_T, P_T)}
    )
    assert (out.terms[0].weight == 1).all()


@dataclass(frozen=True)
class Whole(RolloutLoss):
    def value(self, logp, mask, rows, batch):
        return -(logp * mask).sum(1)


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="over whole rollouts"):
        load("drift_gating", base=Objective(Whole()))
    with pytest.raises(UserError, match="'newline'"):
        load("drift_gating", spans="sentence")
    with pytest.raises(UserError, match="not negative"):
        load("drift_gating", tau=-1.0)
    with pytest.raises(UserError, match="belong to the sampled policy gradient"):
        load("drift_gating", base=Objective(Counted()), clip=(0.2, 0.2))
