"""SDFT: the skipped start, the weight of a rollout whose engine is not the trainer, and the mean
of means.
"""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective import Divergence, Objective
from opdkit.testing import check, evaluate
from tests.methods.dense import Dense, assert_dense, between
from tests.methods.own_teacher import followed
from tests.methods.ragged import on
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens


@pytest.mark.parametrize(
    ("alpha", "value", "gradient"),
    [
        (0.0, 0.193794, (0.3, -0.2, -0.1)),
        (0.5, 0.050875, (0.077318, -0.050263, -0.027055)),
        (1.0, 0.223805, (0.346243, -0.220389, -0.125854)),
    ],
)
def test_the_divergence(alpha, value, gradient):
    method = load("sdft", alpha=alpha, n_skip=0)
    out = evaluate(method, logits(P_S), tokens(0), models={"teacher": logits(P_T)})
    assert close(out.loss, value) and close(out.grad[0, 0], gradient)


# ------------------------------------------------------------------------------------ the start


def test_a_rollout_with_nothing_behind_the_start_is_a_zero():
    three = logits(P_S, P_S, P_S)
    out = evaluate(load("sdft"), three, tokens(0, 0, 0), models={"teacher": logits(P_T, P_T, P_T)})
    assert out.loss == 0 and (out.grad == 0).all()
    assert out.terms[0].denominator.item() == 1


def test_it_counts_as_a_rollout_beside_others():
    """Three tokens and four: the fourth alone has a loss, and two rollouts share it."""
    student, teacher = logits(*[P_S] * 4).expand(2, -1, -1), logits(*[P_T] * 4).expand(2, -1, -1)
    mask = torch.arange(4) < torch.tensor([[3], [4]])
    out = evaluate(
        load("sdft"), student, torch.zeros(2, 4).long(), mask, models={"teacher": teacher}
    )
    assert close(out.loss, 0.223805 / 2)
    assert (out.grad[:, :3] == 0).all() and (out.grad[0] == 0).all()
    assert close(out.grad[1, 3], numbers(0.346243, -0.220389, -0.125854) / 2)


def test_skipped_tokens_leave_the_count():
    """Five tokens, all alike: their mean is that of one, however many are skipped."""
    five, other = logits(*[P_S] * 5), {"teacher": logits(*[P_T] * 5)}
    losses = [
        evaluate(load("sdft", n_skip=n), five, tokens(*[0] * 5), models=other).loss
        for n in range(5)
    ]
    assert all(close(loss, 0.223805) for loss in losses)


# ------------------------------------------------------------------------------------- the engine

LEVEL = -1.5
APART = [0.0, 1.0, -1.0]  # log-prob by the trainer before the step, less that by the engine


def of_engine(apart, **arguments):
    """A rollout whose engine differs; the teacher's KL is 1 at each of its tokens in no way."""
    student = [[LEVEL] * len(apart)]
    facts = {"sampler": [[LEVEL - a for a in apart]], "models": {"teacher": [[-0.5] * len(apart)]}}
    return on(load("sdft", **arguments), student, before=student, **facts)


def test_a_rollout_is_weighed_by_its_mean_capped_ratio():
    """(1 + 2 + 0.367879) / 3 = 1.122626, the same at each token."""
    out = of_engine(APART, n_skip=0)
    assert close(out.terms[0].weight, [[1.122626] * 3])
    assert close(of_engine(APART, n_skip=0, cap_ratio=math.inf).terms[0].weight[0, 0], 1.362054)


def test_the_weight_is_that_of_the_tokens_that_are_trained():
    """With the first skipped (2 + 0.367879) / 2 = 1.183940, with two 0.367879."""
    assert close(of_engine(APART, n_skip=1).terms[0].weight, [[0, 1.183940, 1.183940]])
    assert close(of_engine(APART, n_skip=2).terms[0].weight, [[0, 0, 0.367879]])


def test_an_engine_that_is_the_trainer_weighs_exactly_one():
    assert (of_engine([0.0] * 7, n_skip=0).terms[0].weight == 1).all()


def test_the_weight_is_of_the_trainer_before_the_step():
    """It does not move with the student from one update on the same rollouts to the next."""
    here = {"before": [[-1.0]], "sampler": [[-1.5]], "models": {"teacher": [[-0.5]]}}
    a, b = (on(load("sdft", n_skip=0), [[s]], **here).terms[0].weight for s in (-1.0, -0.3))
    assert torch.equal(a, b) and close(a, [[math.exp(0.5)]], 12)


# ------------------------------------------------------------------------------- the mean of means


def at_distance(nats):
    """(q, 1 - q) with KL((1/2, 1/2) || (q, 1 - q)) = nats: 4 q (1 - q) = exp(-2 nats)."""
    q = (1 - math.sqrt(1 - math.exp(-2 * nats))) / 2
    return q, 1 - q


def test_rollouts_count_alike_whatever_their_length():
    """Losses (1, 1, 1, 1) and (4): (1 + 4) / 2 = 2.5; over tokens it would be 8 / 5 = 1.6."""
    student = torch.zeros(2, 4, 2, dtype=torch.float64)
    teacher = torch.cat([logits(*[at_distance(n)] * 4) for n in (1.0, 4.0)])
    mask = torch.arange(4) < torch.tensor([[4], [1]])
    ids = torch.zeros(2, 4).long()
    out = evaluate(load("sdft", n_skip=0), student, ids, mask, models={"teacher": teacher})
    assert close(out.loss, 2.5, 9)
    plain = Objective(Divergence("reverse_kl"))
    assert close(evaluate(plain, student, ids, mask, models={"teacher": teacher}).loss, 1.6, 9)


# -------------------------------------------------------------------------------------- the teacher


def test_the_student_under_a_demonstration():
    own = {"kind": "self", "view": "demonstration"}
    assert load("sdft").models == {"teacher": own | {"weights": "ema", "rate": 0.01}}
    for weights in ("fixed", "live"):
        made = load("sdft", teacher=weights).models
        assert made == {"teacher": own | {"weights": weights}}


@pytest.mark.parametrize(("rate", "then"), [(0.0, 1.0), (1.0, 2.0), (0.01, 1.01)])
def test_the_average(rate, then):
    """Frozen, the live student, 0.01 * 2 + 0.99 * 1."""
    teacher = load("sdft", rate=rate).models["teacher"]
    assert followed(teacher, (1.0, 2.0)) == pytest.approx([1.0, then], abs=1e-12)


# --------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("n_skip", [0, 1, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_naive_form(alpha, n_skip, off_policy):
    def formula(d: Dense):  # []
        kept = (d.mask & (torch.arange(d.mask.shape[1]) >= n_skip)).double()
        count = kept.sum(1).clamp_min(1)
        capped = (d.at(d.before) - d.at(d.sampler)).exp().clamp(max=2.0)
        weight = (kept * capped).sum(1) / count
        each = (kept * between(d.student, d.teacher, alpha)).sum(1) / count
        return (weight * each).mean()

    assert_dense(load("sdft", alpha=alpha, n_skip=n_skip), formula, off_policy)


@pytest.mark.parametrize("arguments", [{}, {"alpha": 0.0}, {"alpha": 0.5}, {"n_skip": 0}])
def test_check(arguments):
    check(load("sdft", **arguments))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"alpha": -0.5}, "alpha=-0.5 must lie in .* 1 reverse KL"),
        ({"n_skip": -1}, "counts tokens"),
        ({"cap_ratio": 0}, "largest ratio of trainer to sampler"),
        ({"rate": 1.5}, "moves to the student"),
        ({"teacher": "peer"}, "must be one of fixed, ema, live"),
    ],
)
def test_bad_arguments_are_explained(wrong, said):
    with pytest.raises(UserError, match=said):
        load("sdft", **wrong)
