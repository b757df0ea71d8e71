"""TRIRL: the policy after its limited step is exactly optimal for the corrected reward."""

from __future__ import annotations

import pytest
import torch

from opdkit.neighbours.trirl import (
    Settings,
    corrected,
    grid,
    held,
    learnt,
    log_ratio,
    mixed,
    occupancy,
    ranks,
    soft_optimal,
    steps,
)

F64 = torch.float64


def world(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A reward, log pi optimal for it, and moves of a random world of six states, three actions."""
    draw = torch.Generator().manual_seed(seed)
    moves = torch.rand(6, 3, 6, generator=draw, dtype=F64)
    moves /= moves.sum(-1, keepdim=True)
    reward = torch.randn(6, 3, generator=draw, dtype=F64)
    return reward, soft_optimal(reward, moves, 0.9, 1e-13), moves


def test_the_numbers_of_one_state() -> None:
    """One state, actions are all there is: pi is the softmax of the reward."""
    reward = torch.tensor([0.2, -0.1, 0.5], dtype=F64)
    wanted = torch.tensor([1, 0.3, -0.4], dtype=F64)
    before = reward.log_softmax(-1)
    after = held(wanted, before, 3).log_softmax(-1)
    assert before.exp().tolist() == pytest.approx([0.323554, 0.239694, 0.436752], abs=1e-6)
    assert after.exp().tolist() == pytest.approx([0.391724, 0.262581, 0.345695], abs=1e-6)
    # r' is a step of eps towards some rtilde; a quarter of it remains
    kept = corrected(reward, reward + (wanted - reward) / 0.1, 0.1, 3)
    assert kept.tolist() == pytest.approx([0.4, 0, 0.275], abs=1e-12)
    assert torch.allclose(kept.log_softmax(-1), after, atol=1e-12)
    assert (after.exp() * (after - before)).sum().item() == pytest.approx(0.018014, abs=1e-6)
    moves = torch.ones(1, 3, 1, dtype=F64)
    assert torch.allclose(soft_optimal(reward[None], moves, 0.9), before[None], atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.7, 3.0, 40.0])
def test_the_new_policy_is_optimal_for_the_corrected_reward(eta: float) -> None:
    """In a world of several states too: log pi_k is the reward less a potential's change."""
    reward, logp, moves = world()
    toward = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    after = soft_optimal(held(mixed(reward, toward, 0.4), logp, eta), moves, 0.9, 1e-13)
    kept = soft_optimal(corrected(reward, toward, 0.4, eta), moves, 0.9, 1e-13)
    assert torch.allclose(after, kept, atol=1e-10)


def test_no_limit_goes_all_the_way_and_a_hard_one_nowhere() -> None:
    reward, logp, moves = world()
    toward = reward.flip(0)
    wanted = mixed(reward, toward, 0.4)
    assert torch.equal(corrected(reward, toward, 0.4, 0), wanted)
    assert torch.equal(held(wanted, logp, 0), wanted)
    assert torch.allclose(corrected(reward, toward, 0.4, 1e12), reward, atol=1e-10)
    assert torch.allclose(soft_optimal(held(wanted, logp, 1e12), moves, 0.9), logp, atol=1e-8)


def test_an_expert_that_is_matched_lets_the_reward_decay() -> None:
    """rtilde = 0, and the reward falls by the share eps / (1 + eta)."""
    reward, _, _ = world()
    seen = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    assert (log_ratio(seen, seen, 5.0) == 0).all()
    assert torch.allclose(corrected(reward, torch.zeros_like(reward), 0.1, 3), reward * 0.975)


def test_the_soft_optimum_is_the_best_there_is() -> None:
    """E[sum gamma^t (r + H)], by solving for it, falls with any change of the policy."""
    reward, logp, moves = world()

    def worth(logits: torch.Tensor) -> torch.Tensor:
        policy = logits.softmax(-1)
        start = torch.full((6,), 1 / 6, dtype=F64)
        visits = occupancy(policy, moves, start, 0.9)
        return (visits[:, None] * policy * (reward - policy.log())).sum()

    logits = logp.clone().requires_grad_()
    best = worth(logits)
    (slope,) = torch.autograd.grad(best, logits)
    assert slope.abs().max() < 1e-10
    other = logp + 0.1 * torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    assert worth(other) < best


def test_occupancy_is_the_discounted_sum_of_visits() -> None:
    _, logp, moves = world()
    at = start = torch.tensor([1, 0, 0, 0, 0, 0], dtype=F64)
    total = torch.zeros(6, dtype=F64)
    for t in range(400):
        total += 0.1 * 0.9**t * at
        at = at @ (logp.exp()[..., None] * moves).sum(1)
    assert torch.allclose(occupancy(logp.exp(), moves, start, 0.9), total, atol=1e-12)


def test_ranks_correlate_as_spearman_says() -> None:
    """Of 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6."""
    a, b = torch.tensor([1.0, 2, 3, 4]), torch.tensor([20.0, 1, 400, 30])
    assert (ranks(a) * ranks(b)).mean().item() == pytest.approx(0.6)


def test_limited_steps_are_the_path_of_dual_ascent_with_smaller_ones() -> None:
    """Whole solutions with eps / (1 + eta) pass through the same rewards and policies."""
    many = Settings(seeds=2, size=3, eps=0.4, eta=3.0)
    few = Settings(seeds=2, size=3, eps=0.1, eta=0.0)
    ends = [learnt(grid(s), steps(grid(s), s, 5.0)["TRIRL"], 6, lambda: None) for s in (many, few)]
    assert torch.allclose(ends[0].reward, ends[1].reward, atol=1e-6)
    assert torch.allclose(ends[0].logp, ends[1].logp, atol=1e-6)


@pytest.mark.neighbours
def test_the_order_of_rewards_is_recovered() -> None:
    from opdkit.base.progress import progress
    from opdkit.neighbours.trirl import run

    assert run(Settings(seeds=5, size=4, betas=()), progress).holds
