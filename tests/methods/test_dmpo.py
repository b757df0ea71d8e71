"""DMPO: a prompt's responses against each other, as their rewards or a teacher would have them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.dmpo import DistributionMatching
from opdkit.methods.method import load
from opdkit.objective import Objective, Reward
from opdkit.testing import check
from tests.methods.ragged import on, slopes
from tests.methods.steps import GROUPS, advantages, agrees, at, ppo, step
from tests.methods.toy import close, numbers

FOUR = {"reward": [1.1, 0.1, 1.1, 0.0], "phi": [-0.5, -0.7, -1.2, -0.9]}


def alone(rows, alpha=1 / 15, group=None, **facts):
    """The second term by itself, of log-probs [B][T] of the tokens."""
    objective = Objective(DistributionMatching(Reward(), alpha))
    return on(objective, rows, group=[0] * len(rows) if group is None else group, **facts)


def test_values():
    out = alone([[x] for x in FOUR["phi"]], reward=FOUR["reward"])
    p = (numbers(*FOUR["reward"]) * 15).softmax(0)
    assert close(p, [0.5, 0, 0.5, 0])
    assert close(numbers(*FOUR["phi"]).softmax(0), [0.334937, 0.274223, 0.166325, 0.224515])
    assert close(out.loss, 0.066048)
    found = slopes(out, [[x] for x in FOUR["phi"]])
    assert close(found, [-0.030125, 0.035567, -0.028982, 0.023540])
    two = alone([[-0.5], [-0.7]], 0.5, reward=[1.0, 0.0])
    assert close(numbers(2, 0).softmax(0), [0.880797, 0.119203])
    assert close(numbers(-0.5, -0.7).softmax(0), [0.549834, 0.450166])
    assert close(two.loss, 0.109537)


def test_the_slope_is_the_cards_and_shared_by_a_rollouts_tokens():
    """dL/dphi_k = (2/G) q_k ((q_k - p_k) - sum_j q_j (q_j - p_j)), over |y_k| at each token."""
    rows = [[-0.3, -0.7, -0.5], [-0.9], [-0.1, -1.1], [-1.5, -0.2, -0.4, -0.6]]
    reward = [0.2, 1.0, 0.4, 0.1]
    phi = numbers(*(sum(row) / len(row) for row in rows))
    p, q = (numbers(*reward) / 0.4).softmax(0), phi.softmax(0)
    each = 2 / 4 * q * ((q - p) - (q * (q - p)).sum())
    out = alone(rows, 0.4, reward=reward)
    assert close(slopes(out, rows), [d / len(row) for d, row in zip(each, rows) for _ in row], 12)
    assert close(out.loss, (p - q).square().mean(), 12)
    assert close(each.sum(), 0.0, 12)


def test_what_is_added_to_all_of_a_prompt_changes_nothing():
    rows, moved = ([[x + c] for x in FOUR["phi"]] for c in (0.0, -3.0))
    a, b = (alone(r, reward=FOUR["reward"]) for r in (rows, moved))
    assert close(a.loss, b.loss, 12) and close(slopes(a, rows), slopes(b, moved), 12)


def test_equal_rewards_even_the_likelihoods_out():
    rows = [[-0.5], [-0.7], [-1.2]]
    out = alone(rows, reward=[0.7] * 3)
    found = slopes(out, rows)
    assert found[0] > 0 > found[2] and close(found.sum(), 0.0, 12)  # the most probable is lowered
    even = alone([[-0.6]] * 3, reward=[0.7] * 3)
    assert even.loss < 1e-30 and even.grad.abs().max() < 1e-15
    grpo = on(load("grpo"), rows, reward=[0.7] * 3, group=[0] * 3)
    assert (grpo.grad == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_small_loss_means_small_differences(seed):
    """|p_i - q_i| <= sqrt(G L)."""
    g = torch.Generator().manual_seed(seed)
    rows, reward = -torch.rand(6, 1, generator=g) * 3, torch.rand(6, generator=g)
    out = alone(rows.tolist(), 0.3, reward=reward.tolist())
    apart = ((reward.double() / 0.3).softmax(0) - rows[:, 0].double().softmax(0)).abs()
    assert apart.max() <= (6 * out.loss).sqrt() + 1e-7


@pytest.mark.parametrize(
    ("alpha", "p"), [(1e9, [0.25] * 4), (1e-9, [0.5, 0, 0.5, 0]), (1e-30, [0.5, 0, 0.5, 0])]
)
def test_temperatures_at_their_ends(alpha, p):
    out = alone([[x] for x in FOUR["phi"]], alpha, reward=FOUR["reward"])
    q = numbers(*FOUR["phi"]).softmax(0)
    assert close(out.loss, (numbers(*p) - q).square().mean(), 8)


def test_prompts_count_alike_however_many_rollouts_they_have():
    """The mean over prompts of the mean over their rollouts, here of 4 and of 2."""
    rows, reward = [[x] for x in (*FOUR["phi"], -0.5, -0.7)], [*FOUR["reward"], 1.0, 0.0]
    out = alone(rows, 0.5, [3, 3, 3, 3, 8, 8], reward=reward)
    a = alone(rows[:4], 0.5, reward=reward[:4]).loss
    assert close(out.loss, (a + 0.109537) / 2)


def test_a_rollout_without_tokens_is_not_there():
    rows, reward = [[-0.5], [], [-0.7]], [1.0, 0.3, 0.0]
    assert close(alone(rows, 0.5, reward=reward).loss, 0.109537)


def test_without_the_second_term_it_is_grpo_bit_for_bit():
    ours, plain = load("dmpo", lam=0.0), load("grpo")
    assert ours.objective == plain.objective
    case = step(0, fresh=False, models=())
    assert torch.equal(case.run(ours.objective).grad, case.run(plain.objective).grad)


def naive(case, lam, alpha, score=None):
    """The card's formula, prompt by prompt; `score` [B] of the rollouts, default their reward."""

    def formula(now, models):
        r = case.columns["reward"] if score is None else score(models)
        logp, before, sampler = (
            at(x, case.tokens) for x in (now, models["before"], models["sampler"])
        )
        a = advantages(r, GROUPS, std=True)[:, None]
        loss = (before - sampler).exp() * ppo((logp - before).exp(), a)
        n = case.mask.sum(1)
        total = (torch.where(case.mask, loss, 0.0).sum(1) / n).mean()
        phi = torch.where(case.mask, logp, 0.0).sum(1) / n
        for name in set(GROUPS):
            own = [i for i, g in enumerate(GROUPS) if g == name]
            p, q = (r[own] / alpha).softmax(0), phi[own].softmax(0)
            total = total + lam * (p - q).square().mean() / len(set(GROUPS))
        return total

    return formula


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"lam": 0.5, "alpha": 1.0}])
def test_equal_to_a_naive_reference(seed, fresh, arguments):
    case = step(seed, fresh, models=())
    values = {"lam": 2.0, "alpha": 1 / 15, **arguments}
    assert agrees(load("dmpo", **arguments), case, naive(case, **values))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("reference", [True, False])
def test_a_teachers_score_is_the_mean_of_its_log_ratio(fresh, reference):
    """In both terms; no reward is read."""
    case = step(1, fresh, models=("teacher", "reference"))
    method = load("dmpo", score="teacher", reference=reference, alpha=0.5)

    def score(models):
        logp = at(models["teacher"], case.tokens)
        if reference:
            logp = logp - at(models["reference"], case.tokens)
        return torch.where(case.mask, logp, 0.0).sum(1) / case.mask.sum(1)

    case = replace(case, columns={"group": GROUPS})
    assert agrees(method, case, naive(case, 2.0, 0.5, score))
    assert "reward" not in method.needs.columns
    assert ("reference" in method.needs.models) == reference


def test_a_teacher_that_likes_all_alike_evens_out():
    """As equal rewards do; with the teacher at the reference its score is 0 of every rollout."""
    rows = [[-0.5], [-0.7, -0.7], [-1.2]]
    same = [[-0.9], [-0.2, -0.4], [-2.0]]
    models = {"teacher": same, "reference": same}
    out = on(load("dmpo", score="teacher"), rows, group=[0] * 3, models=models)
    plain = on(load("dmpo"), rows, group=[0] * 3, reward=[0.5] * 3)
    assert close(out.grad, plain.grad, 12) and out.grad.abs().max() > 0.01


def test_bad_arguments_are_explained():
    for arguments, words in (
        ({"alpha": 0.0}, "alpha=0.0 must be positive: it is the temperature"),
        ({"lam": -1.0}, "lam=-1.0 must be at least 0"),
        ({"lam": math.nan}, "lam=nan is no number"),
        ({"score": "judge"}, "score='judge' must be one of reward, teacher"),
    ):
        with pytest.raises(UserError, match=words):
            load("dmpo", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"lam": 0.0},
        {"lam": 30.0, "alpha": 1e-3},
        {"score": "teacher"},
        {"score": "teacher", "reference": False, "alpha": 1.0, "clip": None},
    ],
)
def test_check(arguments):
    check(load("dmpo", **arguments))
