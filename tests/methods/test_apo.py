"""APO: how much KL a right answer has, and how much more a wrong one is pushed down."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.apo import Pull, TooLong
from opdkit.methods.method import load
from opdkit.objective import Advantage, Const, Likelihood, Objective
from opdkit.testing import check, evaluate
from tests.methods.steps import GROUPS, advantages, agrees, at, ppo, step
from tests.methods.toy import close, numbers


def weighed(signal, lengths, correct, reward=None, group=None, marks=None):
    """[B]: a signal per rollout, of rollouts of these lengths."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    out = evaluate(
        Objective(Likelihood() * signal),
        torch.zeros(*ids.shape, 2).double(),
        ids,
        torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None],
        reward=numbers(*correct) if reward is None else reward,
        correct=correct,
        group=[0] * len(lengths) if group is None else group,
        marks=marks,
    )
    return out.terms[0].weight[:, 0] if marks is None else out.terms[0].weight


RIGHT = (0.288077, 0.493165, 0.639173, 0.743119, 0.817120, 0.869804, 0.907310)


@pytest.mark.parametrize("right", range(9))
def test_how_much_kl_a_right_answer_has(right):
    """Of eight: the fewer are right, the less; the others have all of it, and so have all where
    none or all are right.
    """
    correct = [i < right for i in range(8)]
    found = weighed(Pull(Advantage()), [1] * 8, correct)
    expected = RIGHT[right - 1] if 0 < right < 8 else 1.0
    assert close(found[:right], [expected] * right) and (found[right:] == 1).all()


def test_it_is_the_advantage_that_decides_and_right_ones_that_are_counted():
    """All right, with and without the format: the formula would give 0.934012. Half of the others
    are right, of which one earns less than the mean.
    """
    found = weighed(Pull(Advantage()), [1] * 4, [True] * 4, [1.5, 1.0, 1.5, 1.0])
    assert (found == 1).all() and close(numbers(1 - math.exp(-math.e)), 0.934012)
    found = weighed(Pull(Advantage()), [1] * 4, [True, True, False, False], [1.5, 0.2, 0.5, 0.0])
    assert close(found, [0.743119, 1, 1, 1])


@pytest.mark.parametrize(
    ("more", "factor"),
    [(0, 1.0), (-50, 1.0), (10, 1.0001000), (500, 1.0049875), (1000, 1.0099501), (4000, 1.0392104)],
)
def test_how_much_more_a_wrong_answer_is_pushed_down(more, factor):
    found = weighed(TooLong(), [100, 100 + more], [True, False])
    assert close(found, [1.0, factor], 7)


def test_it_never_doubles():
    found = weighed(TooLong(), [1, 3_000_000], [True, False])
    assert 1.9999 < found[1] < 2


def test_the_right_ones_mean_length_counts():
    found = weighed(TooLong(), [100, 300, 1200, 150], [True, True, False, False])
    assert close(found, [1, 1, 1.00995, 1], 5)
    # no right one: nothing is too long; other prompts' are not looked at
    found = weighed(
        TooLong(), [100, 1200, 100, 1200], [True, True, False, False], group=[0, 0, 1, 1]
    )
    assert (found == 1).all()


def test_lengths_count_what_the_student_wrote():
    """A tool's 1000 tokens make no answer longer."""
    tool = torch.zeros(2, 1011, dtype=torch.bool)
    tool[1, 5:1005] = True
    found = weighed(TooLong(), [1, 1011], [True, False], marks={"tool": tool})
    assert close(found[1, 0], 1.0001, 7)


@pytest.mark.parametrize("seed", range(3))
def test_no_advantage_changes_its_sign_and_no_right_answer_its_size(seed):
    case = step(seed, fresh=True, models=("reference",))
    correct = case.columns["reward"] > 0.5
    case = replace(case, columns={**case.columns, "correct": correct})
    long, plain = (
        case.run(load("apo", stcr=stcr).objective).terms[0].credit for stcr in (True, False)
    )
    assert torch.equal(long.sign(), plain.sign()) and torch.equal(long[correct], plain[correct])
    assert (long.abs() >= plain.abs()).all()


def naive(case, beta, dads, stcr):
    """The card's formula, rollout by rollout."""
    reward, correct = case.columns["reward"], case.columns["correct"].tolist()
    a, length = advantages(reward, GROUPS, std=True).tolist(), case.mask.sum(1).tolist()

    def k(i, share):
        return 1.0 if a[i] <= 0 or share in (0, 1) else 1 - math.exp(-math.e * share)

    def s(i, right):
        more = 0 if correct[i] or not right else length[i] - sum(right) / len(right)
        return 1 + (1 - 1.00001**-more) if more > 0 else 1.0

    def formula(now, models):
        logp, before, sampler, ref = (
            at(x, case.tokens)
            for x in (now, models["before"], models["sampler"], models["reference"])
        )
        k3 = (ref - logp).exp() - (ref - logp) - 1
        total = torch.zeros((), dtype=now.dtype)
        for i, own in enumerate(case.mask):
            peers = [j for j, g in enumerate(GROUPS) if g == GROUPS[i]]
            right = [length[j] for j in peers if correct[j]]
            credit = a[i] * (s(i, right) if stcr else 1)
            loss = (before - sampler).exp()[i] * ppo((logp - before).exp()[i], numbers(credit))
            total = total + loss[own].sum() / case.mask.sum()
            pull = k(i, len(right) / len(peers)) if dads else 1
            total = total + beta * pull * k3[i, own].mean() / len(GROUPS)
        return total

    return formula


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("switches", [(True, True), (True, False), (False, True)])
def test_equal_to_a_naive_reference(seed, fresh, switches):
    case = step(seed, fresh, models=("reference",))
    reward = case.columns["reward"]
    case = replace(case, columns={**case.columns, "correct": reward > reward.median()})
    values = {"beta": 0.3, "dads": switches[0], "stcr": switches[1]}
    assert agrees(load("apo", **values), case, naive(case, **values))


def test_switched_off_it_is_grpo_with_a_penalty():
    """Per tokens the policy's, per rollouts the KL's."""
    off = load("apo", beta=0.1, dads=False, stcr=False).objective
    assert off.terms[0] == load("grpo", loss="dapo").objective.terms[0]
    assert off.terms[1] == load("grpo", reference_kl=0.1).objective.terms[1]
    free = load("apo", beta=0.0, stcr=False)
    assert free.objective == load("grpo", loss="dapo").objective
    assert "reference" not in free.needs.models and "correct" not in free.needs.columns
    assert load("apo").objective.terms[1].weight == Pull(Advantage()) * Const(1e-3)


def test_bad_arguments_are_explained():
    with pytest.raises(
        UserError, match=r"beta=-1.0 must be at least 0: it is the weight of the KL"
    ):
        load("apo", beta=-1.0)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"beta": 1.0, "dads": False}, {"beta": 0.1, "stcr": False}, {"beta": 0.0, "clip": None}],
)
def test_check(arguments):
    check(load("apo", **arguments))
