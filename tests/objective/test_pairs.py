"""Losses over pairs and signals of whole responses: who is compared with whom, how it counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opdkit.objective import (
    JSD,
    Advantage,
    Alpha,
    Batch,
    ForwardKL,
    LogRatio,
    LogU,
    Marked,
    Objective,
    OfOthers,
    PairLoss,
    Reward,
    RowSum,
)
from opdkit.objective.facts import ColumnFact, LogpFact
from opdkit.testing import evaluate
from tests.methods.ragged import on
from tests.methods.toy import close

# log-probs of one-token responses: right, right, wrong of one prompt; right, wrong of another
L, REF = (-1.0, -2.0, -0.7, -1.2, -1.4), -1.1
GROUP, RIGHT = [0, 0, 0, 1, 1], [1, 1, 0, 1, 0]


def made(loss: PairLoss, logp=L, reference=REF, **facts):  # type: ignore[no-untyped-def]
    known = {"group": GROUP, "correct": RIGHT, **facts}
    rows = [[x] for x in logp]
    return on(loss, rows, models={"reference": [[reference]] * len(rows)}, **known)


def test_every_right_one_is_compared_with_every_wrong_one_of_its_prompt() -> None:
    """Each rollout carries the mean of its pairs, so a prompt adds the mean over its pairs, weighed
    by its rollouts: (3 (p02 + p12) / 2 + 2 p34) / 5.
    """

    def pair(w: int, l: int) -> float:
        return math.log1p(math.exp(-0.5 * (L[w] - L[l])))

    expected = (3 * (pair(0, 2) + pair(1, 2)) / 2 + 2 * pair(3, 4)) / 5
    out = made(PairLoss(LogU(), 0.5))
    assert close(out.loss, expected, 12) and out.terms[0].denominator == 5


def test_one_pair_to_a_prompt_is_the_mean_over_pairs() -> None:
    out = made(PairLoss(LogU(), 0.5), L[2:], group=[0, 0, 1], correct=[1, 0, 1])
    one = math.log1p(math.exp(-0.5 * (L[2] - L[3])))
    assert close(out.loss, one, 12)
    # the third has nobody to be compared with: no loss, and not counted
    assert out.terms[0].denominator == 2 and (out.grad[2] == 0).all()


@pytest.mark.parametrize("correct", [[1] * 5, [0] * 5])
def test_where_all_are_right_or_all_wrong_there_is_no_pair(correct: list[int]) -> None:
    out = made(PairLoss(), correct=correct)
    assert out.loss == 0 and (out.grad == 0).all()


def test_marked_rollouts_are_in_no_pair() -> None:
    apart = torch.tensor([[True], [False], [False], [True], [False]])
    out = made(PairLoss(LogU(), 0.5, apart="online"), marks={"online": apart})
    assert close(out.loss, math.log1p(math.exp(-0.5 * (L[1] - L[2]))), 12)
    assert out.terms[0].denominator == 2


@pytest.mark.parametrize(
    ("loss", "steepest"),
    [
        (PairLoss(ForwardKL(), 0.1, -30.0), math.exp(30)),
        (PairLoss(Alpha(0.5), 0.1, -60.0), math.exp(30)),
        (PairLoss(JSD(0.5), 0.2), 0.5),
        (PairLoss(LogU(), 0.1), 1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_chosen_and_all_but_impossible_still_pulls(
    loss: PairLoss, steepest: float, dtype: torch.dtype
) -> None:
    """800 nats below the reference: a value without an infinity, and the slope at the bound."""
    logp = torch.tensor([[-800.0], [-1.0]], dtype=dtype, requires_grad=True)
    batch = Batch(torch.zeros(2, 1).long(), torch.ones(2, 1).bool(), dtype=dtype)
    batch.facts = {
        LogpFact("reference"): torch.zeros(2, 1, dtype=dtype),
        ColumnFact("group"): torch.zeros(2).long(),
        ColumnFact("correct"): torch.tensor([True, False]),
    }
    value = loss.value(logp, batch.mask, torch.arange(2), batch)
    (slope,) = torch.autograd.grad(value.mean(), logp)
    assert bool(value.isfinite().all())
    factor = 2 if isinstance(loss.kind, JSD) else 1
    assert slope[0].item() == pytest.approx(-0.1 * factor * steepest, rel=1e-5)


def test_unlikely_ones_beyond_the_bound_are_worth_what_those_at_it_are() -> None:
    at, beyond, near = (
        PairLoss(ForwardKL(), 1.0, -30.0).worth(
            torch.tensor([[x]], dtype=torch.float64),
            torch.ones(1, 1).bool(),
            torch.arange(1),
            _nothing(),
        )
        for x in (-30.0, -31.0, -29.9)
    )
    assert at == beyond == -math.exp(30) and near > at


def _nothing() -> Batch:
    batch = Batch(torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), dtype=torch.float64)
    batch.facts[LogpFact("reference")] = torch.zeros(1, 1, dtype=torch.float64)
    return batch


def test_what_it_reports() -> None:
    """Means over pairs of what both are worth, and of how often the right one is worth more."""
    batch = Batch(torch.zeros(5, 1).long(), torch.ones(5, 1).bool(), dtype=torch.float64)
    batch.facts = {
        LogpFact("live"): torch.tensor(L, dtype=torch.float64)[:, None],
        LogpFact("reference"): torch.full((5, 1), REF, dtype=torch.float64),
        ColumnFact("group"): torch.tensor(GROUP),
        ColumnFact("correct"): torch.tensor(RIGHT).bool(),
    }
    told = PairLoss(LogU(), 0.5).metrics(batch, batch.trained)
    pairs = ((0, 2), (1, 2), (3, 4))
    chosen, rejected = (sum(0.5 * (L[p[side]] - REF) for p in pairs) / 3 for side in (0, 1))
    assert told["pairs/chosen"].item() == pytest.approx(chosen, abs=1e-12)
    assert told["pairs/rejected"].item() == pytest.approx(rejected, abs=1e-12)
    assert told["pairs/margin"].item() == pytest.approx(chosen - rejected, abs=1e-12)
    assert told["pairs/accuracy"].item() == pytest.approx(1 / 3)
    some = torch.tensor([1, 1, 1, 0, 0])[:, None].bool()  # another optimiser step learns the rest
    told = PairLoss(LogU(), 0.5).metrics(batch, some)
    margin = sum(0.5 * (L[w] - L[l]) for w, l in pairs[:2]) / 2
    assert told["pairs/margin"].item() == pytest.approx(margin, abs=1e-12)
    batch.facts[ColumnFact("correct")] = torch.zeros(5).bool()
    assert PairLoss().metrics(batch, batch.trained) == {}


# ---------------------------------------------------------------------------- of whole responses


def batch_of(rewards: list[float], group: list[int], **marks: Tensor) -> Batch:
    n = len(rewards)
    batch = Batch(torch.zeros(n, 2).long(), torch.ones(n, 2).bool(), dtype=torch.float64)
    batch.facts = {
        ColumnFact("reward"): torch.tensor(rewards, dtype=torch.float64),
        ColumnFact("group"): torch.tensor(group),
        **{ColumnFact(f"mark:{name}"): values for name, values in marks.items()},
    }
    return batch


def test_less_the_mean_of_the_others() -> None:
    batch = batch_of([1.0, 3.0, 8.0, 5.0], [0, 0, 0, 1])
    assert close(OfOthers(Reward())(batch)[:, 0], [1 - 5.5, 3 - 4.5, 8 - 2.0, 5.0], 12)
    # a group of several has what `Advantage` calls rloo
    assert torch.equal(OfOthers(Reward())(batch)[:3], Advantage("rloo")(batch)[:3])
    equal = batch_of([0.7] * 16, [0] * 16)
    assert (OfOthers(Reward())(equal) == 0).all()


def test_among_marked_ones_the_others_are_not_there() -> None:
    online = torch.tensor([[False, True], [True, True], [False, False], [False, False]])
    batch = batch_of([1.0, 3.0, 8.0, 5.0], [0, 0, 0, 0], online=online)
    assert close(OfOthers(Reward(), Marked("online"))(batch)[:, 0], [-2.0, 2.0, 8.0, 5.0], 12)


def test_the_sum_over_a_response_is_of_its_own_tokens() -> None:
    batch = batch_of([0.0, 0.0], [0, 0])
    batch.trained[1, 0] = False
    a, b = (torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.float64) * x for x in (1, 0.5))
    batch.facts |= {LogpFact("student"): a, LogpFact("reference"): b}
    assert RowSum(LogRatio("student", "reference"))(batch).tolist() == [[1.5], [4.0]]


def test_pairs_are_those_of_the_rollouts_that_an_optimiser_step_has() -> None:
    objective = Objective(PairLoss(LogU(), 0.5))
    logits = torch.tensor([[[x, math.log(-math.expm1(x))]] for x in L], dtype=torch.float64)
    reference = torch.zeros(5, 1, 2, dtype=torch.float64)
    known = {"models": {"reference": reference}, "group": GROUP, "correct": RIGHT}
    whole = evaluate(objective, logits, torch.zeros(5, 1).long(), **known)
    last = evaluate(
        objective, logits[3:], torch.zeros(2, 1).long(),
        models={"reference": reference[3:]}, group=GROUP[3:], correct=RIGHT[3:],
    )  # fmt: skip
    assert close(whole.grad[3:] * 5, last.grad * 2, 12)
