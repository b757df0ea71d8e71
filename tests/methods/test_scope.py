"""SCOPE: shares of perplexity inside a prompt and a set, and the two paths."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import evaluate, fabricate
from tests.methods.ragged import on
from tests.methods.toy import close, numbers

STUDENT, TEACHER = (1.2, 2.6, 3.8), (4.5, 2.9, 1.7)  # perplexities


def weights(perplexities, correct, lengths=(1, 1, 1), **arguments):
    """[R]: the weight of each rollout in its path; the perplexities are the student's if they are
    correct, else the teacher's.
    """
    rows = [[-math.log(p)] * n for p, n in zip(perplexities, lengths)]
    flat = [[-1.0] * n for n in lengths]
    student, teacher = (rows, flat) if correct else (flat, rows)
    facts = {
        "correct": [correct] * len(rows),
        "group": [0] * len(rows),
        "models": {"teacher": teacher},
    }
    return on(load("scope", **arguments), student, **facts).terms[not correct].weight[:, 0]


@pytest.mark.parametrize(
    ("perplexities", "correct", "arguments", "mean_one"),
    [
        (STUDENT, True, {}, (0.473684, 1.026316, 1.5)),
        (TEACHER, False, {}, (0.577058, 0.895435, 1.527507)),
        # the launch scripts
        (STUDENT, True, {"student_power": -1}, (1.687927, 0.779043, 0.533030)),
        # the config's default: 3 * PPL / 9.1
        (TEACHER, False, {"teacher_power": 1}, (1.483516, 0.956044, 0.560440)),
    ],
)
def test_shares(perplexities, correct, arguments, mean_one):
    assert close(weights(perplexities, correct, **arguments), mean_one)


@pytest.mark.parametrize(
    ("perplexities", "correct", "tau", "share"),
    [
        (STUDENT, True, 1.0, (0.157895, 0.342105, 0.500000)),
        (TEACHER, False, 1.0, (0.192353, 0.298478, 0.509169)),
        (STUDENT, True, 0.5, (0.063604, 0.298587, 0.637809)),
        (TEACHER, False, 0.5, (0.096017, 0.231196, 0.672787)),
        (STUDENT, True, 1e9, (1 / 3, 1 / 3, 1 / 3)),
        (TEACHER, False, 1e-3, (0, 0, 1)),
        (STUDENT, True, 1e-3, (0, 0, 1)),
    ],
)
def test_shares_that_sum_to_one(perplexities, correct, tau, share):
    assert close(weights(perplexities, correct, tau=tau) / 3, share)


def test_they_are_a_softmax_of_mean_log_probs():
    hard = weights([math.exp(0.2), math.exp(0.6)], True, (2, 3)) / 2
    assert close(hard, (0.401312, 0.598688)) and close(hard, numbers(0.2, 0.6).softmax(0), 12)
    read = weights([math.exp(1.0), math.exp(0.5)], False, (3, 2)) / 2
    assert close(read, (0.377541, 0.622459)) and close(read, numbers(-1.0, -0.5).softmax(0), 12)


def test_alone_equal_or_repeated():
    assert weights([7.0], True, (2,)) == 1 and weights([7.0], False, (2,)) == 1
    assert close(weights([2.5] * 3, True), (1, 1, 1), 12)
    # tokens twice: the same mean
    assert close(weights(STUDENT, True, (4, 8, 2)), weights(STUDENT, True, (2, 4, 1)), 12)


def test_sets_do_not_see_each_other():
    rows = [[-math.log(p)] for p in (*STUDENT, *TEACHER, 9.0)]
    correct, group = [True] * 3 + [False] * 3 + [True], [0] * 6 + [1]
    out = on(load("scope"), rows, models={"teacher": rows}, correct=correct, group=group)
    assert close(out.terms[0].weight[:, 0], (0.473684, 1.026316, 1.5, 0, 0, 0, 1))
    assert close(out.terms[1].weight[:, 0], (0, 0, 0, 0.577058, 0.895435, 1.527507, 0))


def test_denominators():
    """Likelihood over the tokens of correct rollouts, distillation over all: 2 and 5 here."""
    student = [[-0.5, -0.7], [-1.0, -2.0, -0.4]]
    facts = {"correct": [True, False], "group": [0, 0]}
    out = on(
        load("scope"), student, models={"teacher": [[-1.0, -1.0], [-1.5, -1.0, -0.4]]}, **facts
    )
    assert [t.denominator.item() for t in out.terms] == [2, 5]
    assert close(out.loss, (0.5 + 0.7) / 2 + (0.5 - 1.0) / 5)


def test_all_wrong_with_uniform_weights_is_opd():
    case = fabricate(load("scope").objective)
    # alone in its prompt: weight 1
    wrong = type(case)(**{**vars(case), "columns": {"group": range(6), "correct": [False] * 6}})
    ours, opd = wrong.run(load("scope").objective), wrong.run(load("opd").objective)
    assert torch.equal(ours.loss, opd.loss) and torch.equal(ours.grad, opd.grad)


def test_all_correct_does_not_see_the_teacher():
    case = fabricate(load("scope").objective)
    correct = {**vars(case), "columns": case.columns | {"correct": [True] * 6}}
    other = {
        "teacher": torch.randn(
            case.student.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
        )
    }
    a, b = (
        type(case)(**correct).run(load("scope").objective),
        type(case)(**{**correct, "models": other}).run(load("scope").objective),
    )
    assert torch.equal(a.loss, b.loss) and torch.equal(a.grad, b.grad) and a.terms[1].value == 0


def test_a_correct_rollout_has_no_part_in_distillation():
    case = fabricate(load("scope").objective)
    out = case.run(load("scope").objective)
    correct = torch.as_tensor(case.columns["reward"]) > 0
    assert (out.terms[1].weight[correct] == 0).all() and (out.terms[0].weight[~correct] == 0).all()


def test_the_likelihood_has_no_ratio():
    out = on(
        load("scope"),
        [[-0.5]],
        before=[[-1.0]],
        sampler=[[-2.0]],
        models={"teacher": [[-3.0]]},
        correct=[True],
        group=[0],
    )
    assert close(out.loss, 0.5, 12)


def test_weights_are_those_before_the_step():
    facts = {"models": {"teacher": [[-1.0], [-1.0]]}, "correct": [True, True], "group": [0, 0]}
    a, b = (
        on(load("scope"), s, before=[[-0.2], [-0.6]], **facts)
        for s in ([[-0.2], [-0.6]], [[-3.0], [-0.1]])
    )
    assert torch.equal(a.terms[0].weight, b.terms[0].weight) and close(
        a.terms[0].weight[:, 0] / 2, (0.401312, 0.598688)
    )


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="temperature of the shares"):
        load("scope", tau=0)


def test_tokens_of_a_tool_are_in_no_perplexity():
    z = torch.zeros(2, 3, 2, dtype=torch.float64)
    z[0, 1, 0] = 30.0
    mask = torch.tensor([[True, False, True], [True, True, True]])
    facts = {"correct": [True, True], "group": [0, 0]}
    out = evaluate(
        load("scope"), z, torch.zeros(2, 3, dtype=torch.int64), mask, {"teacher": z}, **facts
    )
    assert close(out.terms[0].weight, mask.double(), 12)
