"""HNPG: the card's numbers and identities, each piece against a naive reference, and a small lock
that is opened.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opdkit.cli import main
from opdkit.neighbours.hnpg import (
    RIDGE,
    Episodes,
    Lock,
    Settings,
    advantages,
    conjugate_gradient,
    critic_loss,
    fisher_product,
    fit_critic,
    gae,
    gradient,
    iterate,
    learning_run,
    least_squares,
    natural_step,
)

H, N, D, A = 2, 7, 5, 3


@pytest.fixture(autouse=True)
def _doubles() -> None:
    torch.manual_seed(0)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_one_natural_step_by_hand() -> None:
    """pi = [.5, .5], Q = [1, 0]: A = [.5, -.5]. Both actions once stand for the expectation: slope
    [.25, -.25], F = [[.25, -.25], [-.25, .25]], w = [.5, -.5]; pi becomes [e^.5, e^-.5] / sum.
    """
    states, theta = torch.ones(1, 2, 1, dtype=torch.float64), torch.zeros(1, 1, 2).double()
    probs = (states @ theta).softmax(-1)
    actions = torch.tensor([[0, 1]])
    gain = advantages(torch.tensor([1.0, 0.0], dtype=torch.float64), probs[0, 0])
    assert gain.tolist() == [0.5, -0.5]
    slope = gradient(states, actions, gain[None], probs)
    assert slope.flatten().tolist() == pytest.approx([0.25, -0.25], abs=1e-12)
    w = conjugate_gradient(lambda v: fisher_product(states, probs, v, 0.0), slope, 10)
    assert w.flatten().tolist() == pytest.approx([0.5, -0.5], abs=1e-12)
    after = (theta + w).flatten().softmax(-1)
    assert after.tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)


def test_advantages_are_worth_nothing_in_the_mean() -> None:
    """Whatever Q is: E_pi A = 0 at every state, so the surrogate there is 0 at pi = pi_old."""
    q, probs = doubles(H, N, A), doubles(H, N, A).softmax(-1)
    assert (probs * advantages(q, probs)).sum(-1).abs().max() < 1e-15


def test_the_critics_loss_by_hand() -> None:
    """Fresh errors 1 and 3: mean 5; stored errors 2 and 0: mean 2; lam .5: 6. lam 0: 5."""
    q_on, returns = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])
    q_off, targets = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])
    assert critic_loss(q_on, returns, q_off, targets, 0.5).item() == 6.0
    assert critic_loss(q_on, returns, q_off, targets, 0.0).item() == 5.0


def test_the_critic_is_the_least_of_its_loss() -> None:
    """There the gradient of critic_loss + RIDGE |W|^2 is 0; actions without pairs get 0."""
    states, actions, targets = doubles(9, D), torch.tensor([0, 1, 1, 0, 0, 1, 1, 0, 1]), doubles(9)
    lam, on = 0.7, 4
    weights = torch.tensor([1 / on] * on + [lam / 5] * 5, dtype=torch.float64)
    solved = least_squares(states, actions, targets, weights, A).requires_grad_()
    q = (states @ solved).gather(1, actions[:, None])[:, 0]
    loss = critic_loss(q[:on], targets[:on], q[on:], targets[on:], lam)
    (loss + RIDGE * solved.square().sum()).backward()
    assert solved.grad is not None and solved.grad.abs().max() < 1e-12
    assert torch.equal(solved[:, 2], torch.zeros(D, dtype=torch.float64))


def test_estimated_advantages_by_hand() -> None:
    """Rewards 0, 0, 1 and V = .5, .25, .5: deltas -.25, .25, .5. tau .5: .5, .5, 0. tau 1 is the
    return less V, tau 0 the delta.
    """
    rewards, values = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0.5], [0.25], [0.5]])
    assert gae(rewards, values, 0.5).flatten().tolist() == [0.0, 0.5, 0.5]
    assert gae(rewards, values, 1.0).flatten().tolist() == [0.5, 0.75, 0.5]
    assert gae(rewards, values, 0.0).flatten().tolist() == [-0.25, 0.25, 0.5]


def log_prob(theta: Tensor, states: Tensor, actions: Tensor) -> Tensor:
    return (states @ theta).log_softmax(-1).gather(-1, actions[..., None])[..., 0]


def test_the_gradient_is_that_of_the_surrogate() -> None:
    """mean A pi / pi_old, by autograd, for each step apart."""
    theta, states, gain = doubles(H, D, A).requires_grad_(), doubles(H, N, D), doubles(H, N)
    actions = torch.randint(A, (H, N))
    now = log_prob(theta, states, actions)
    ((now - now.detach()).exp() * gain).mean(1).sum().backward()
    probs = (states @ theta).softmax(-1).detach()
    assert theta.grad is not None
    assert torch.allclose(gradient(states, actions, gain, probs), theta.grad, atol=1e-12)


def test_the_fisher_matrix_is_the_curvature_of_kl() -> None:
    """F v is the Hessian of mean KL(pi_old || pi) at pi_old, times v, by autograd twice."""
    theta, states, v = doubles(1, D, A), doubles(1, N, D), doubles(1, D, A)
    old = (states @ theta).log_softmax(-1)

    def kl(at: Tensor) -> Tensor:
        return (old.exp() * (old - (states @ at).log_softmax(-1))).sum(-1).mean()

    _, dense = torch.autograd.functional.hvp(kl, theta, v)
    got = fisher_product(states, old.exp(), v, 0.0)
    assert torch.allclose(got, dense, atol=1e-12)
    assert torch.allclose(fisher_product(states, old.exp(), v, 0.3), dense + 0.3 * v, atol=1e-12)


def test_conjugate_gradients_solve_each_step_apart() -> None:
    """As many steps as unknowns; more change nothing, and where b = 0 the answer is 0, no nan."""
    roots = doubles(H, D * A, D * A)
    matrices = roots @ roots.mT + torch.eye(D * A, dtype=torch.float64)
    b = doubles(H, D, A)
    b[1] = 0

    def product(x: Tensor) -> Tensor:
        return (matrices @ x.reshape(H, -1, 1)).reshape(H, D, A)

    got = conjugate_gradient(product, b, 40)
    expected = torch.linalg.solve(matrices, b.reshape(H, -1, 1)).reshape(H, D, A)
    assert torch.allclose(got, expected, atol=1e-8) and not got[1].any()


def test_a_step_gains_and_stays_near() -> None:
    """A linear surrogate rises, KL is max_kl but for higher orders and damping; without anything to
    gain nothing moves.
    """
    settings = Settings(damping=0.0, max_kl=1e-4)
    theta, states = doubles(H, D, A), doubles(H, 200, D)
    probs = (states @ theta).softmax(-1)
    actions = torch.distributions.Categorical(probs).sample()
    gain = doubles(H, 200)
    after = natural_step(theta, states, actions, gain, settings)
    new = (states @ after).softmax(-1)
    kl = (probs * (probs / new).log()).sum(-1).mean(-1)
    assert torch.allclose(kl, torch.full_like(kl, 1e-4), rtol=0.05)
    ratio = (log_prob(after, states, actions) - log_prob(theta, states, actions)).exp()
    assert ((ratio - 1) * gain).mean(1).min() > 0
    assert torch.equal(natural_step(theta, states, actions, 0 * gain, settings), theta)


def episodes(count: int, horizon: int = 3) -> Episodes:
    shape = horizon, count
    return Episodes(torch.randn(*shape, D), torch.randint(A, shape), torch.rand(shape))


def test_without_weight_stored_episodes_teach_nothing() -> None:
    """lam = 0: the critic is that of the fresh returns alone; and lam is not read without them."""
    fresh, theta = episodes(20), torch.randn(3, D, A)
    alone = fit_critic(fresh, None, theta, 1.0)
    assert torch.allclose(fit_critic(fresh, episodes(9), theta, 0.0), alone, atol=1e-5)
    for h in range(3):
        weights = torch.full((20,), 1 / 20)
        naive = least_squares(fresh.states[h], fresh.actions[h], fresh.returns[h], weights, A)
        assert torch.allclose(alone[h], naive, atol=1e-6)
    a, b = (iterate(theta, fresh, None, Settings(lam=lam)) for lam in (0.0, 5.0))
    assert torch.equal(a, b)


def test_bellman_targets_go_from_the_last_step_to_the_first() -> None:
    """Two states in turn without noise, one action: Q_h is the sum of the rewards from h on, though
    each stored reward is known one step ahead only, and the fresh returns say 9.
    """
    one_hot = torch.eye(3)[:, None].expand(3, 50, 3)
    rewards = torch.tensor([1.0, 2.0, 4.0])[:, None].expand(3, 50)
    none = torch.zeros(3, 50, dtype=torch.long)
    stored, fresh = (
        Episodes(one_hot, none, rewards),
        Episodes(one_hot[:, :1], none[:, :1], 0 * rewards[:, :1] + 3),
    )
    critic = fit_critic(fresh, stored, torch.zeros(3, 3, 1), 1e6)
    got = [critic[h, h, 0].item() for h in range(3)]
    assert got == pytest.approx([7.0, 6.0, 4.0], rel=1e-3)


def test_the_lock() -> None:
    """Right actions earn 1; a wrong one 0.1 by a coin, once, and there is no way back; an
    observation, turned back, shows state and step.
    """
    lock = Lock(6, 4, noise=0.0)
    right = lock.play(40, lambda seen, state, h: lock.right[h, state.clamp_max(1)])
    assert torch.equal(right.returns[0], torch.ones(40)) and not right.rewards[:-1].any()
    wrong = lock.play(4000, lambda seen, state, h: (lock.right[h, state.clamp_max(1)] + 1) % 4)
    assert (
        abs(wrong.returns[0].mean() - 0.05) < 4 * 0.05 / 4000**0.5 and not wrong.rewards[1:].any()
    )
    seen = lock.observe(torch.tensor([0, 1, 2]), 4) @ lock.turn / lock.size
    expected = F.one_hot(torch.tensor([0, 1, 2]), lock.size) + F.one_hot(torch.tensor(7), lock.size)
    assert torch.allclose(seen, expected.float(), atol=1e-6)


def test_the_expert_errs_once_an_episode() -> None:
    """With probability 1 / H, and then 3 of 4 actions are wrong: (1 - 3 / (4 H))^H pay 1."""
    lock = Lock(6, 4, noise=0.1)
    share = (lock.expert(4000).returns[0] == 1).double().mean().item()
    assert abs(share - (1 - 3 / 24) ** 6) < 4 * 0.5 / 4000**0.5


def test_a_lock_that_only_stored_episodes_open() -> None:
    """Five steps of ten actions: chance opens it once in 10^5. The on-policy one learns to take the
    lure.
    """
    settings = Settings(iterations=40, batch=300, stored=300)
    hybrid, alone = (
        learning_run(5, with_it, 0, settings, lambda: None) for with_it in (True, False)
    )
    assert hybrid[-1] > 0.9 and alone[-1] < 0.1


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    """One horizon or several; a table with both algorithms for each."""
    small = ["seeds=2", "iterations=2", "batch=12", "stored=8", f"output={tmp_path}"]
    assert main(["neighbours", "hnpg", "horizon=[2, 3]", *small]) == 0
    kept = json.loads((tmp_path / "outcome.json").read_text())
    assert [panel["x"] for panel in kept["panels"]] == [[0, 12], [0, 12]]
    assert [(row["horizon"], row["algorithm"]) for row in kept["table"]] == [
        (h, kind) for h in ("2", "3") for kind in ("HNPG", "on-policy")
    ]


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"actions": 1}, {"lam": -1.0}, {"max_kl": 0.0}])
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Settings(**wrong)  # type: ignore[arg-type]
