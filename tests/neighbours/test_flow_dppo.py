"""Flow-DPPO: the divergence of a step, the mask, and steps of the stochastic equation."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.neighbours.flow_dppo import (
    Record,
    Sampler,
    Settings,
    Task,
    advantages,
    compared,
    gaussian_kl,
    levels,
    logp,
    masked,
    mean_after,
    ppo,
    smooth,
    spread,
    train,
    when,
)
from opdkit.neighbours.flows import Net

F64 = torch.float64


def test_the_kl_of_a_step() -> None:
    """Elements .0072 and .02: 0.0272 in all, 0.0136 in the mean."""
    old, new = torch.tensor([0.1, -0.2], dtype=F64), torch.tensor([0.16, -0.1], dtype=F64)
    kl = gaussian_kl(old, new, torch.tensor(0.5, dtype=F64))
    assert kl.tolist() == pytest.approx([0.0072, 0.02])
    assert kl.sum().item() == pytest.approx(0.0272) and kl.mean().item() == pytest.approx(0.0136)
    normal = [torch.distributions.Normal(m, 0.5) for m in (old, new)]
    assert torch.allclose(kl, torch.distributions.kl_divergence(*normal))


def test_log_ratios_are_those_of_the_gaussians() -> None:
    """Mean over dimensions; what both share cancels."""
    draw = torch.Generator().manual_seed(0)
    x, old, new = (torch.randn(4, 3, generator=draw, dtype=F64) for _ in range(3))
    std = torch.tensor([0.3, 0.5, 1.0, 2.0], dtype=F64)
    exact = [torch.distributions.Normal(m, std[:, None]).log_prob(x).mean(-1) for m in (new, old)]
    assert torch.allclose(logp(x, new, std) - logp(x, old, std), exact[0] - exact[1])


# of tokens: probabilities before [.01, .5, .5] and now [.03, .6, .45]
RATIOS = torch.tensor([3.0, 1.2, 0.9], dtype=F64)
ADVANTAGE = torch.tensor([1.0, 1.0, -1.0], dtype=F64)
SHIFT = torch.tensor([0.02, 0.1, 0.05], dtype=F64)


@pytest.mark.parametrize(
    ("delta", "kept"), [(0.08, [1, 0, 1]), (0.04, [1, 0, 0]), (0.0, [0, 0, 0]), (math.inf, [1] * 3)]
)
def test_which_tokens_the_mask_drops(delta: float, kept: list[int]) -> None:
    """All three steps lead further away; no limit is the plain policy gradient."""
    loss = masked(RATIOS, ADVANTAGE, SHIFT, delta)
    assert torch.allclose(loss, -ADVANTAGE * RATIOS * torch.tensor(kept))


def test_a_clip_stops_other_tokens_than_the_mask() -> None:
    """PPO at 0.2 stops the rare token alone; 1.2 is its bound, so one is tried on either side."""
    r = torch.tensor([3.0, 1.19, 1.21, 0.9], requires_grad=True)
    (slope,) = torch.autograd.grad(ppo(r, torch.tensor([1.0, 1, 1, -1]), 0.2).sum(), r)
    assert slope.tolist() == [0, -1, 0, 1]


def test_a_step_back_is_never_dropped() -> None:
    """A > 0 and r < 1, or A < 0 and r > 1, however far away; nor is one that stands still."""
    r, a = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([1.0, -1.0, 1.0])
    for delta in (0.0, 1e-5):
        assert torch.equal(masked(r, a, torch.full((3,), 9.0), delta), -a * r)


def test_the_first_update_is_the_plain_policy_gradient() -> None:
    """There D = 0 < delta: the gradient is -A grad logp, and dropped ones stay in the mean."""
    draw = torch.Generator().manual_seed(0)
    x, old = (torch.randn(4, 3, generator=draw, dtype=F64) for _ in range(2))
    std, a = torch.full((4,), 0.5, dtype=F64), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    new = old.clone().requires_grad_()
    ours = logp(x, new, std)
    r = (ours - logp(x, old, std)).exp()
    loss = masked(r, a, gaussian_kl(old, new.detach(), std).mean(-1), 1e-5).mean()
    (got,) = torch.autograd.grad(loss, new, retain_graph=True)
    (plain,) = torch.autograd.grad(-(a * ours).mean(), new)
    assert torch.allclose(got, plain)
    half = masked(torch.tensor([2.0, 2.0]), torch.ones(2), torch.tensor([1.0, 0.0]), 0.5)
    assert half.mean().item() == -1


def test_advantages_share_one_deviation() -> None:
    """Less each prompt's mean 1 and 4, over the deviation of -1, 1, -2, 2: sqrt(10 / 3)."""
    got = advantages(torch.tensor([[0.0, 2.0], [2.0, 6.0]], dtype=F64))
    expected = torch.tensor([[-1, 1], [-2, 2]], dtype=F64) / (math.sqrt(10 / 3) + 1e-6)
    assert torch.allclose(got, expected)


def score(v: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """[n, D] grad log p_s(x) = -E[noise | x] / s."""
    return -(x + (1 - s[:, None]) * v) / s[:, None]


def test_the_score_of_gaussian_data_is_known() -> None:
    """x_0 ~ N(0, 4): x_s ~ N(0, (1 - s)^2 4 + s^2); E[noise - x_0 | x] is linear in x."""
    s, x = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([[1.0], [-2.0], [0.3]])
    variance = 4 * (1 - s) ** 2 + s**2
    velocity = ((s - 4 * (1 - s)) / variance)[:, None] * x
    assert torch.allclose(score(velocity, x, s), -x / variance[:, None])


def test_a_step_without_noise_is_the_flows_and_noise_follows_the_score() -> None:
    draw = torch.Generator().manual_seed(0)
    x, v = (torch.randn(3, 2, generator=draw, dtype=F64) for _ in range(2))
    s = torch.tensor([0.9, 0.5, 0.3], dtype=F64)
    below = s - 0.1
    assert torch.allclose(mean_after(x, v, s, below, 0 * s), x - 0.1 * v)
    std = spread(s, below, 0.7, 0.9)
    drift = std[:, None] ** 2 / 2 * score(v, x, s)
    assert torch.allclose(mean_after(x, v, s, below, std), x - 0.1 * v + drift)
    # sigma of the first level counts s as 0.9: 0.7 sqrt(1 / 0.1) sqrt(0.1)
    first = spread(torch.tensor(1.0), torch.tensor(0.9), 0.7, 0.9)
    assert first.item() == pytest.approx(0.7)


def test_sampling_keeps_the_distribution_of_a_flow() -> None:
    """Of data N(0, 4) with the exact velocity, many small noisy steps end in N(0, 4)."""

    def exact(x: torch.Tensor, s: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return ((s - 4 * (1 - s)) / (4 * (1 - s) ** 2 + s**2))[..., None] * x

    sampler = Sampler(levels(200), 0.7)
    label = torch.zeros(4000, dtype=torch.long)
    xs, means = sampler.sample(exact, label, 1, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert xs.shape == (4000, 201, 1) and means.shape == (4000, 200, 1)
    assert xs[:, -1].std().item() == pytest.approx(2, abs=0.1)


def tiny() -> tuple[Task, Settings]:
    torch.manual_seed(0)
    base = Net(2, 2, 4, 16)
    task = Task(base, 4, 2, lambda x, prompt: x[:, 0], 1e-2)
    return task, Settings(steps=4, trained=2, group=8, batches=15)


def test_training_moves_the_reward_and_starts_at_no_distance() -> None:
    """Samples that should lie right come to lie right; the same seed gives the same record."""
    task, s = tiny()
    record = train(task, lambda r, a, apart: masked(r, a, apart, 1.0), s, 0)
    assert record.away[0] == 0 and record.away[-1] > 0
    assert sum(record.reward[-5:]) > sum(record.reward[:5]) + 1
    assert train(task, lambda r, a, apart: masked(r, a, apart, 1.0), s, 0) == record


def test_a_mask_at_zero_lets_no_batch_go_on() -> None:
    """The first update has r = 1 and is let through; a second one would lead further."""
    task, s = tiny()
    free = train(task, lambda r, a, apart: masked(r, a, apart, math.inf), s, 0)
    shut = train(task, lambda r, a, apart: masked(r, a, apart, 0.0), s, 0)
    assert shut.reward[0] == free.reward[0] and sum(shut.moved) < sum(free.moved)


def test_kl_at_equal_reward_is_read_on_straight_lines() -> None:
    assert when(0.5, [0.0, 0.4, 0.8], [0, 1, 3]) == pytest.approx(1.5)
    assert when(0.0, [0.1, 0.4], [7, 9]) == 7
    assert smooth([1.0] * 3 + [2.0] * 9) == pytest.approx([1.7, 1.8, 1.9])
    slow = Record([0.1 * i for i in range(20)], [1.0 * i for i in range(20)], [])
    fast = Record([0.2 * i for i in range(20)], [1.0 * i for i in range(20)], [])
    panels, at = compared("a", {"slow": [slow], "fast": [fast]})
    # both start in the mean of ten; the highest that both reach is slow's last mean, 1.45
    assert panels[1].x[-1] == pytest.approx(1.45, abs=1e-6)
    assert at["slow"][0] == pytest.approx(14.5, abs=1e-4)
    assert at["fast"][0] == pytest.approx(7.25, abs=1e-4)


@pytest.mark.neighbours
def test_both_tasks_run_small() -> None:
    from opdkit.base.progress import progress
    from opdkit.neighbours.flow_dppo import run

    outcome = run(Settings(seeds=2, batches=12, clips=(0.01,)), progress)
    assert [row["task"] for row in outcome.table] == ["ring"] * 2 + ["digits"] * 2
    assert all(math.isfinite(y) for p in outcome.panels for ys in p.lines.values() for y in ys[0])
