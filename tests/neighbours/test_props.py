"""PROPS: the card's numbers, worked by hand; that it does what it is for, on a bandit; and, in the
group `neighbours`, runs on tasks of gymnasium.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.cli import main
from opdkit.neighbours.props import (
    KINDS,
    Sampler,
    Settings,
    avoid,
    behaviour_loss,
    divergence,
    log_frequencies,
    looked_at,
    sampling_error,
)

FULL = Settings(minibatches=1, target_kl=1.0, pushes=1, every=1)  # one step on the whole buffer


def log_ratio(*rho: float) -> Tensor:
    return torch.tensor(rho, dtype=torch.float64).log().requires_grad_()


def test_at_equal_policies_what_was_seen_is_pushed_down() -> None:
    """rho = 1: loss 1, and its gradient is the mean of grad log pi_b: 1 / N at each log-prob."""
    log_b = torch.log(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)).requires_grad_()
    loss = behaviour_loss(log_b, log_b.detach(), clip=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(1.0, abs=1e-12)
    assert log_b.grad is not None and log_b.grad.tolist() == pytest.approx([1 / 3] * 3, abs=1e-12)


@pytest.mark.parametrize(
    ("rho", "loss", "slope"), [(0.6, 0.7, 0.0), (0.8, 0.8, 0.8), (1.4, 1.4, 1.4)]
)
def test_only_those_that_became_rare_enough_are_left(rho: float, loss: float, slope: float) -> None:
    """d rho / d log pi_b = rho; below 1 - eps the loss is 1 - eps, a constant; there is no bound
    above.
    """
    log_b = log_ratio(rho)
    got = behaviour_loss(log_b, torch.zeros_like(log_b), clip=0.3)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert log_b.grad is not None and log_b.grad.item() == pytest.approx(slope, abs=1e-12)


def test_the_price_of_leaving_the_policy() -> None:
    """(rho - 1) - log rho: 0 at 1, 1 - log 2 at 2, KL(pi_s || pi_b) in expectation under pi_s."""
    assert divergence(log_ratio(2.0), torch.zeros(1)).item() == pytest.approx(1 - math.log(2))
    both = log_ratio(2.0, 1.0)
    without, with_price = (behaviour_loss(both, torch.zeros(2), 0.3, lam) for lam in (0.0, 0.5))
    assert (with_price - without).item() == pytest.approx(0.5 * (1 - math.log(2)) / 2, abs=1e-7)
    torch.manual_seed(0)
    s, b = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    price = sum(s.exp()[a] * divergence(b[a : a + 1], s[a : a + 1]) for a in range(6))
    assert float(price) == pytest.approx(float((s.exp() * (s - b)).sum()), abs=1e-12)


def bandit(counts: list[int]) -> Tensor:
    """Actions, each as often as it says."""
    return torch.tensor([a for a, count in enumerate(counts) for _ in range(count)])


def pushed(logits: Tensor, actions: Tensor, settings: Settings, rate: float = 0.1) -> Tensor:
    """The behaviour policy's logits after `avoid` with plain descent, from those of the policy."""
    moved = logits.clone().requires_grad_()
    log_s = logits.log_softmax(-1)[actions]
    optimizer = torch.optim.SGD([moved], lr=rate)
    avoid(optimizer, lambda rows: moved.log_softmax(-1)[actions[rows]], log_s, settings)
    return moved.detach()


def test_a_bandit_by_hand() -> None:
    """pi = [.5, .5], counts [3, 1]: gradient [3/4 - 1/2, 1/4 - 1/2], so a step of rate .1 moves the
    logits by .1 [-.25, .25]; the sampling error is 3/4 log(3/2) + 1/4 log(1/2).
    """
    logits, actions = torch.zeros(2, dtype=torch.float64), bandit([3, 1])
    assert pushed(logits, actions, FULL).tolist() == pytest.approx([-0.025, 0.025], abs=1e-12)
    log_mle = log_frequencies(torch.zeros(4, dtype=torch.long), actions)
    error = sampling_error(log_mle, logits.log_softmax(-1)[actions])
    assert error.item() == pytest.approx(0.130812, abs=1e-6)


def test_a_sample_that_shows_the_policy_pushes_nothing() -> None:
    """Frequencies [1/2, 1/4, 1/4] are the policy's: the gradient is 0, the sampling error too."""
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    actions = bandit([4, 2, 2])
    assert torch.allclose(pushed(logits, actions, FULL), logits, atol=1e-15)
    log_mle = log_frequencies(torch.zeros(8, dtype=torch.long), actions)
    error = sampling_error(log_mle, logits.log_softmax(-1)[actions])
    assert error.item() == pytest.approx(0.0, abs=1e-12)


def test_no_divergence_allowed_is_on_policy_sampling() -> None:
    """target_kl = 0: pi_b stays pi_s bit for bit; a bound above 0 is passed by one step at most."""
    logits = torch.zeros(2, dtype=torch.float64)
    actions = bandit([30, 2])
    none = Settings(minibatches=4, target_kl=0.0, pushes=16)
    assert torch.equal(pushed(logits, actions, none), logits)
    bounded, free = (
        pushed(logits, actions, Settings(minibatches=1, target_kl=kl, pushes=300), rate=0.02)
        for kl in (0.01, 9.0)
    )

    def moved(to: Tensor) -> float:
        return divergence(to.log_softmax(-1)[actions], logits.log_softmax(-1)[actions]).item()

    assert 0.01 <= moved(bounded) < 0.012 and moved(free) > 0.05


def test_frequencies_are_those_of_a_count() -> None:
    torch.manual_seed(1)
    states, actions = torch.randint(5, (40,)), torch.randint(3, (40,))
    pairs = list(zip(states.tolist(), actions.tolist()))
    naive = [math.log(pairs.count((s, a)) / states.tolist().count(s)) for s, a in pairs]
    assert log_frequencies(states, actions).tolist() == pytest.approx(naive, abs=1e-12)


def test_on_a_bandit_the_sample_becomes_more_like_the_policy() -> None:
    """Four arms, 64 draws in slices of 4: the mean sampling error over 10 samples falls below half
    of that on-policy, which is near (4 - 1) / (2 x 64).
    """
    policy = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    settings = Settings(minibatches=1, target_kl=0.05, pushes=6)

    def error(avoids: bool, seed: int) -> float:
        torch.manual_seed(seed)
        drawn = torch.empty(0, dtype=torch.long)
        for _ in range(16):
            logits = pushed(policy, drawn, settings, 2.0) if avoids and len(drawn) else policy
            drawn = torch.cat([drawn, torch.multinomial(logits.softmax(-1), 4, replacement=True)])
        log_mle = log_frequencies(torch.zeros_like(drawn), drawn)
        return sampling_error(log_mle, policy.log_softmax(-1)[drawn]).item()

    ours, theirs = (sum(error(avoids, seed) for seed in range(10)) / 10 for avoids in (True, False))
    assert 0.01 < theirs < 0.05 and ours < 0.5 * theirs


def test_a_learning_run_is_looked_at_evenly_and_at_its_end() -> None:
    assert looked_at(Settings(steps=256 * 24, batch=256)) == list(range(2, 25, 2))
    assert looked_at(Settings(steps=256 * 33, batch=256))[-3:] == [28, 30, 33]
    assert looked_at(Settings(steps=1000, batch=256)) == [1, 2, 3]


@pytest.mark.parametrize("wrong", [{"steps": 100}, {"clip": 1.5}, {"every": -1}, {"lam": -1.0}])
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Settings(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ tasks of gymnasium


@pytest.mark.neighbours
@pytest.mark.parametrize("env", ["CartPole-v1", "FrozenLake-v1", "Pendulum-v1"])
def test_without_props_it_is_ppo_of_stable_baselines3(env: str) -> None:
    """One batch, one update: every weight is that of the library's own `learn`."""
    from stable_baselines3 import PPO

    settings = Settings(batch=128, steps=128, frozen=128, epochs=2)
    ours = Sampler(env, 3, settings, 1, pushed=False)
    ours.collect()
    ours.learn()
    theirs = PPO(
        "MlpPolicy",
        env,
        learning_rate=settings.rate,
        n_steps=128,
        batch_size=32,
        n_epochs=2,
        target_kl=0.03,
        seed=3,
        device="cpu",
    )
    theirs.learn(128)
    for mine, its in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert torch.allclose(mine, its, atol=1e-6)


@pytest.mark.neighbours
def test_old_batches_are_scored_under_the_policy_of_now() -> None:
    """The buffer holds the last two batches; log-probs are pi_s', not those of who collected."""
    settings = Settings(batch=64, steps=64, frozen=64, batches=2)
    sampler = Sampler("FrozenLake-v1", 0, settings, 2, pushed=True)
    for _ in range(3):
        sampler.collect()
        states, actions = sampler.tensors()
        with torch.no_grad():
            _, now, _ = sampler.policy.evaluate_actions(states, actions)
        sampler.learn()
        buffer = sampler.model.rollout_buffer
        assert torch.allclose(torch.as_tensor(buffer.log_probs).reshape(-1), now, atol=1e-6)
    assert len(sampler.kept) == 128 and len(now) == 128


@pytest.mark.neighbours
@pytest.mark.parametrize(("env", "seeds"), [("FrozenLake-v1", 2), ("Hopper-v5", 1)])
def test_a_small_run(env: str, seeds: int, tmp_path: Path) -> None:
    """Numbers for every line, discrete and continuous; the table has a row for each."""
    small = [f"seeds={seeds}", "steps=64", "frozen=64", "batch=32", "pushes=2", "epochs=2"]
    assert main(["neighbours", "props", f"env={env}", *small, f"output={tmp_path}"]) == 0
    kept = json.loads((tmp_path / "outcome.json").read_text())
    assert [len(panel["lines"]) for panel in kept["panels"]] == [2, 3, 3]
    for panel in kept["panels"]:
        for runs in panel["lines"].values():
            assert len(runs) == seeds and all(len(line) == len(panel["x"]) == 2 for line in runs)
            assert all(math.isfinite(y) for line in runs for y in line)
    assert [row["sampling"] for row in kept["table"]] == list(KINDS)


@pytest.mark.neighbours
def test_a_task_that_is_none() -> None:
    with pytest.raises(UserError, match=r"cannot be made .*did you mean 'CartPole-v1'"):
        Sampler("CartPol-v1", 0, Settings(), 1, pushed=False)
