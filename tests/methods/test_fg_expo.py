"""FG-ExPO: a KL by how much of a step was solved, and prompts by how often they are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.curricula import Frontier
from opdkit.methods.fg_expo import Solved
from opdkit.methods.method import load
from opdkit.testing import check
from opdkit.types import Rollout
from tests.methods.steps import GROUPS, advantages, agrees, at, ppo, step
from tests.methods.toy import close, numbers

RATES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
WEIGHTS = (0.360448, 0.520450, 0.774837, 1.0, 0.774837, 0.360448)


def factor(reward):
    """The KL's weight over beta, of a step of two prompts with these rewards."""
    case = step(0, fresh=True, models=("reference",))
    case = replace(case, columns={"group": GROUPS, "reward": reward})
    return Solved()(case.batch(load("fg_expo").objective))


@pytest.mark.parametrize(
    ("mean", "rho", "beta"),
    [
        (0.0, 0.5, 0.01),
        (0.25, 0.622459, 0.012449),
        (0.5, 0.731059, 0.014621),
        (0.75, 0.817574, 0.016351),
        (1.0, 0.880797, 0.017616),
    ],
)
def test_values(mean, rho, beta):
    assert close(factor([mean] * 6), [[rho]])
    case = step(0, fresh=True, models=("reference",))
    case = replace(case, columns={"group": GROUPS, "reward": [mean] * 6})
    out = case.run(load("fg_expo").objective)
    assert close(out.terms[1].weight[case.mask], [beta] * int(case.mask.sum()))


def test_it_is_the_mean_of_all_rollouts_of_the_step():
    """Not of one prompt's: 1, 1, 1 and 0, 0, 0 are 0.5 for both. Rewards beyond 0 .. 1 count as
    these.
    """
    assert close(factor([1.0] * 3 + [0.0] * 3), [[0.731059]])
    assert torch.equal(factor([3.0] * 3 + [-2.0] * 3), factor([1.0] * 3 + [0.0] * 3))


def test_an_optimiser_step_on_a_part_has_the_whole_steps_factor():
    case = step(1, fresh=True, models=("reference",))
    case = replace(case, columns={"group": GROUPS, "reward": [1.0, 1.0, 0.9, 0.0, 0.0, 0.1]})
    objective = load("fg_expo").objective
    for rows in ([0, 1, 2], [3, 4, 5]):
        weight = case.run(objective, rows=rows).terms[1].weight[rows]
        assert close(weight[case.mask[rows]].unique(), [0.014621])


def test_how_prompts_are_weighed():
    curriculum = load("fg_expo").curriculum
    assert curriculum == Frontier("gaussian", sigma=0.35, smoothing=0.9, start=0.5)
    weights = curriculum.log_weights(numbers(*RATES)).exp()
    assert close(weights, WEIGHTS)
    share = weights / weights.sum()
    assert close(share, [0.095079, 0.137285, 0.204388, 0.263781, 0.204388, 0.095079])
    p = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    assert close(curriculum.log_weights(p), curriculum.log_weights(1 - p), 12)


@pytest.mark.parametrize(("sigma", "shares"), [(1e6, [1 / 6] * 6), (1e-3, [0, 0, 0, 1, 0, 0])])
def test_widths_at_their_ends(sigma, shares):
    logs = load("fg_expo", sigma=sigma).curriculum.log_weights(numbers(*RATES))
    assert close(logs.softmax(0), shares)


def test_a_table_of_pass_rates():
    """0.9 * 0.5 + 0.1 * 1; a prompt that was not asked stays; at first all are alike."""
    curriculum = load("fg_expo").curriculum
    rollouts = [
        Rollout(f"0/a/{i}", [1], [2], [True], [-1.0], [-1.0], "a", reward=1.0, correct=True)
        for i in range(4)
    ]
    memory = curriculum.observe(rollouts, {"smoothed_pass_rate": {"b": 0.3}})
    assert memory["smoothed_pass_rate"] == {"a": pytest.approx(0.55), "b": 0.3}
    names = [str(i) for i in range(40)]
    asked = [i for at_ in range(300) for i in curriculum.choose(names, 4, at_, 0, {})]
    counts = torch.bincount(torch.tensor(asked), minlength=40)
    assert counts.sum() == 1200 and counts.min() >= 10 and counts.max() <= 55  # 30 each


def naive(case, beta):
    """The card's formula over whole rollouts."""

    def formula(now, models):
        logp, before, sampler, ref = (
            at(x, case.tokens)
            for x in (now, models["before"], models["sampler"], models["reference"])
        )
        reward = case.columns["reward"]
        a = advantages(reward, GROUPS, std=True)[:, None]
        k3 = (ref - logp).exp() - (ref - logp) - 1
        effective = beta * (math.tanh(reward.mean()) + 1) / 2
        loss = (before - sampler).exp() * ppo((logp - before).exp(), a) + effective * k3
        return (torch.where(case.mask, loss, 0.0).sum(1) / case.mask.sum(1)).mean()

    return formula


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("beta", [0.02, 1.0])
def test_equal_to_a_naive_reference(seed, fresh, beta):
    case = step(seed, fresh, models=("reference",))
    assert agrees(load("fg_expo", beta=beta), case, naive(case, beta))


def test_with_a_constant_factor_it_is_grpo():
    case = step(0, fresh=False, models=("reference",))
    case = replace(case, columns={"group": GROUPS, "reward": [1.0, 0.0, 0.5] * 2})
    ours = case.run(load("fg_expo", beta=0.1).objective)
    plain = case.run(load("grpo", reference_kl=0.1 * (math.tanh(0.5) + 1) / 2).objective)
    assert close(ours.grad, plain.grad, 12) and close(ours.loss, plain.loss, 12)
    free = load("fg_expo", beta=0.0)
    assert free.objective == load("grpo").objective and free.curriculum == Frontier()
    assert "reference" not in free.needs.models


def test_bad_arguments_are_explained():
    for arguments, words in (
        ({"beta": -0.1}, "beta=-0.1 must be at least 0: it is the weight of the KL"),
        ({"sigma": 0.0}, "sigma"),
        ({"smoothing": 1.0}, "smoothing"),
    ):
        with pytest.raises(UserError, match=words):
            load("fg_expo", **arguments)


@pytest.mark.parametrize(
    "arguments", [{}, {"beta": 1.0, "sigma": 0.1}, {"beta": 0.0, "clip": None}]
)
def test_check(arguments):
    check(load("fg_expo", **arguments))
