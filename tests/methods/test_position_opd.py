"""OPD on a part of each rollout: which tokens, over which denominator, and how the part grows."""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import evaluate, fabricate
from tests.methods.toy import close


def kept(lengths, width=None, step=0, total_steps=1, **arguments):
    width = width or max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    z = torch.zeros(len(lengths), width, 2, dtype=torch.float64)
    where = {"step": step, "total_steps": total_steps}
    return evaluate(
        load("position_opd", **arguments),
        z,
        torch.zeros_like(mask, dtype=torch.int64),
        mask,
        {"teacher": z},
        **where,
    )


@pytest.mark.parametrize(("length", "count"), [(10, 3), (7, 3), (1, 1), (30, 9), (2, 1)])
@pytest.mark.parametrize("part", ["first", "last"])
def test_how_many_tokens(length, count, part):
    weight = kept([length], part=part).terms[0].weight[0]
    here = weight[:count] if part == "first" else weight[-count:]
    assert weight.sum() == count and (here == 1).all()


def test_a_share_of_a_tenth_of_thirty_is_three():
    # 0.1 * 30 is a little more than 3 in floating point
    assert kept([30], share=0.1).terms[0].weight.sum() == 3


def test_at_least_one_token():
    assert kept([10], share=0.0).terms[0].weight[0].nonzero().tolist() == [[0]]


def test_rows_of_their_own_length_and_all_tokens_in_the_denominator():
    out = kept([10, 4, 0], width=12)
    assert out.terms[0].weight.sum(1).tolist() == [3, 2, 0] and out.terms[0].denominator == 14


def test_only_trained_tokens_count():
    z, mask = (
        torch.zeros(1, 6, 2, dtype=torch.float64),
        torch.tensor([[False, True, False, True, True, True]]),
    )
    ids = torch.zeros(1, 6, dtype=torch.int64)
    first, last = (
        evaluate(load("position_opd", part=p, share=0.5), z, ids, mask, {"teacher": z})
        .terms[0]
        .weight[0]
        .nonzero()[:, 0]
        .tolist()
        for p in ("first", "last")
    )
    assert (first, last) == ([1, 3], [4, 5])


@pytest.mark.parametrize(("step", "share"), [(0, 0.3), (25, 0.402513), (50, 0.65), (100, 1.0)])
def test_cosine_growth(step, share):
    count = (
        kept([100_000], anneal="cosine", step=step, total_steps=101).terms[0].weight.sum().item()
    )
    assert count / 100_000 == pytest.approx(share, abs=1.01e-5)


def test_linear_growth():
    assert kept([1000], anneal="linear", step=25, total_steps=101).terms[0].weight.sum() == 475
    assert kept([1000], anneal="linear", step=100, total_steps=101).terms[0].weight.sum() == 1000


def test_the_gradient_is_that_of_opd_where_it_looks():
    case = fabricate(load("opd").objective)
    ours, opd = case.run(load("position_opd").objective), case.run(load("opd").objective)
    at = ours.terms[0].weight != 0
    assert close(ours.grad[at], opd.grad[at], 15) and (ours.grad[~at] == 0).all() and at.any()
    assert torch.equal(case.run(load("position_opd", share=1.0).objective).grad, opd.grad)


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="'first' or 'last'"):
        load("position_opd", part="middle")
    with pytest.raises(UserError, match="cosine"):
        load("position_opd", anneal="exponential")
