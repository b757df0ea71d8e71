"""SAFE: the pessimistic critic, the controller number by number, the derivative of the penalty."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from opdkit.methods.method import load
from opdkit.methods.safe import (
    CLIMBING,
    CONVERGED,
    PLATEAU,
    WARMUP,
    Control,
    Controller,
    Pull,
    Standard,
    Standing,
    TwinHead,
    Twins,
    soft_min,
)
from opdkit.objective import (
    Around,
    Batch,
    Companions,
    LastToken,
    LogpFact,
    LogRatio,
    Objective,
    Reward,
    Stepped,
)
from opdkit.testing import Case, check
from tests.methods.steps import at, step

PID = Controller()
HEAD = TwinHead()


def seen(standing: Standing, *rewards: float, kl: float = 0.0) -> Standing:
    for reward in rewards:
        standing = standing.after(kl, reward, PID.gains)
    return standing


# --------------------------------------------------------------------------------------- the critic


def test_the_soft_minimum() -> None:
    def one(a: float, *values: float) -> float:
        return soft_min(torch.tensor([values]).double(), a).item()

    for a in (0.001, 0.3, 100.0):
        assert one(a, 1, 1) == pytest.approx(1.0, abs=1e-12)
    for a, value in ((0.001, 0.000693), (0.3, 0.197428), (100.0, 0.498750)):
        assert one(a, 1, 0) == pytest.approx(value, abs=5e-7)
    assert one(0.3, 0.2, 0.8) == pytest.approx(0.369866, abs=5e-7)
    pairs = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    for a in (1e-3, 0.3, 1e3):
        v = soft_min(pairs, a)[:, 0]
        assert (v >= pairs.amin(1) - 1e-12).all() and (v <= pairs.mean(1) + 1e-12).all()
    torch.testing.assert_close(soft_min(pairs, 1e-6)[:, 0], pairs.amin(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(soft_min(pairs, 1e6)[:, 0], pairs.mean(1), rtol=0, atol=1e-5)


def test_two_heads_of_two_layers_on_a_normed_state() -> None:
    """A scale and a shift of the hidden state change nothing; the heads begin apart."""
    state = Companions.build([HEAD], Around(lambda m: 8, torch.device("cpu"), torch.float64))[HEAD]
    twins = state.module  # type: ignore[attr-defined]
    assert isinstance(twins, Twins)
    h = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double()
    assert twins(h).shape == (5, 1)
    torch.testing.assert_close(twins(h), twins(1000 * h + 3), rtol=1e-4, atol=1e-4)
    normed = twins.norm(h)
    a, b = (head(normed) for head in twins.heads)
    assert not torch.isclose(a, b).any()
    expected = -0.3 * ((-a / 0.3).exp() + (-b / 0.3).exp()).log() + 0.3 * math.log(2)
    torch.testing.assert_close(twins(h), expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_heads_is_cut() -> None:
    """AdamW's first step does not see a scale; its first moment does: a tenth of 0.5 in all."""
    state = Companions.build([HEAD], Around(lambda m: 4, torch.device("cpu"), torch.float64))[HEAD]
    for parameter in state.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    state.after_step(Stepped(None, torch.ones(1, 1, dtype=torch.bool)))
    moments = [s["exp_avg"] for s in state.optimiser.state.values()]  # type: ignore[attr-defined]
    norm = torch.cat([m.flatten() for m in moments]).norm()
    assert norm.item() == pytest.approx(0.1 * 0.5, rel=1e-5)


# ----------------------------------------------------------------------------------- the controller


def test_the_pid_on_three_rewards() -> None:
    standings = [seen(Standing(), *rewards) for rewards in ((0.5,), (0.5, 0.6), (0.5, 0.6, 0.4))]
    assert [s.steer for s in standings] == pytest.approx([0.0, 0.001440, -0.002410], abs=5e-10)
    assert [s.level for s in standings] == pytest.approx([0.5, 0.505, 0.49975], abs=1e-12)


def test_its_sum_is_kept() -> None:
    """Velocities of 0.95 fill it at once; it stays at 1, and the threshold in its range."""
    standing = seen(Standing(), 0.0, 1e3, 1e3)
    assert standing.integral == 1.0 and standing.threshold(0.3) == 0.6
    assert seen(standing, -1e6).threshold(0.3) == 0.1


def rewards(*parts: tuple[int, float]) -> Standing:
    """Standing whose PID says nothing, after so many rewards of a kind."""
    every = [value for count, value in parts for _ in range(count)]
    return replace(seen(Standing(), *every), steer=0.0)


def test_the_phases_and_their_thresholds() -> None:
    """0.3 times 1.5, 1.2, 0.8 and 1.0; with 50 to 99 rewards nothing has climbed yet."""
    cases = [
        (rewards((49, 0.5)), WARMUP, 0.45),
        (rewards((50, 0.4), (50, 0.5)), CLIMBING, 0.36),
        (rewards((50, 0.5), (50, 0.5)), PLATEAU, 0.24),
        (rewards((50, 0.8), (50, 0.8)), CONVERGED, 0.3),
        (rewards((50, 0.4), (49, 0.5)), PLATEAU, 0.24),
        (rewards((75, 0.9)), CONVERGED, 0.3),
        (rewards((25, 0.7), (25, 0.9)), PLATEAU, 0.24),  # std 0.1
        (rewards((50, 0.9), (50, 0.4), (50, 0.5)), CLIMBING, 0.36),  # the last hundred count
        (rewards((50, 0.5), (50, 0.5099)), PLATEAU, 0.24),
    ]
    for standing, phase, tau in cases:
        assert standing.phase == phase
        assert standing.threshold(0.3) == pytest.approx(tau, abs=1e-12)
    assert len(cases[-2][0].rewards) == 100


def test_the_averages_of_the_kl_start_cold() -> None:
    found = [seen(Standing(), *[0.5] * n, kl=1.0) for n in (1, 2, 3)]
    assert [s.kl for s in found] == pytest.approx([0.1, 0.19, 0.271], abs=1e-12)
    assert found[0].kl_long == pytest.approx(0.01)
    assert all(PID.penalty(s, 0.1) == (0.0, 0.0) for s in found)  # tau is 0.45


def test_the_penalty() -> None:
    level = rewards((100, 0.5))
    for entropy, gate, penalty in (
        (0.5, 3.333333, 0.022533),
        (2.0, 0.952381, 0.006438),
        (4.0, 0.5, 0.003380),
        (8.0, 0.5, 0.003380),
    ):
        assert PID.gate(entropy) == pytest.approx(gate, abs=5e-7)
        p, slope = PID.penalty(replace(level, kl=0.5), entropy)
        assert p == pytest.approx(penalty, abs=5e-7)
        above, _ = PID.penalty(replace(level, kl=0.5 + 1e-6), entropy)
        assert slope == pytest.approx((above - p) / 1e-6, rel=1e-4)
    assert PID.penalty(replace(level, kl=-1.0), 1.0) == (0.0, 0.0)
    tau = level.threshold(0.3)
    assert PID.penalty(replace(level, kl=tau), 1.0) == (0.0, 0.0)
    p, slope = PID.penalty(replace(level, kl=tau + 1e-8), 1.0)
    assert 0 < p < 1e-15 and 0 < slope < 1e-8  # continuous, and so is its slope


def test_it_moves_once_for_each_optimiser_step_and_is_saved() -> None:
    case, method = step(0, False, ("reference",)), load("safe")
    batch = case.batch(method.objective)
    control = batch.companions[PID]
    assert isinstance(control, Control)
    for updates in (1, 2):
        control.after_step(Stepped(batch, batch.mask, updates=updates))
    kl = LogRatio("live", "reference")(batch)[batch.mask].mean().item()
    mean = float(batch.reward.mean())
    assert control.standing.kl == pytest.approx(0.19 * kl, rel=1e-12)
    assert control.standing.rewards == pytest.approx((mean, mean), rel=1e-12)
    assert control.metrics()["threshold"] == pytest.approx(0.45, abs=1e-3)
    file = io.BytesIO()
    torch.save(control.state_dict(), file)
    file.seek(0)
    again = PID.build(Around(lambda m: 1, torch.device("cpu"), torch.float64))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.standing == control.standing and again.metrics() == control.metrics()


def test_a_step_in_which_nothing_trains_tells_it_nothing() -> None:
    """No reward was 0 there, and no KL."""
    case = step(0, False, ("reference",))
    empty = replace(case, mask=torch.zeros_like(case.tokens, dtype=torch.bool))
    batch = empty.batch(load("safe").objective)
    control = batch.companions[PID]
    assert isinstance(control, Control)
    control.standing = seen(Standing(), 0.5, 0.6, kl=0.4)
    control.after_step(Stepped(batch, batch.mask, updates=3))
    assert control.standing == seen(Standing(), 0.5, 0.6, kl=0.4)


# ---------------------------------------------------------------------------------- the coefficient


def opened(case: Case, share: float = 0.1) -> tuple[Batch, Objective]:
    """A step whose controller has seen much KL: the penalty is open."""
    objective = load("safe", share=share).objective
    batch = case.batch(objective)
    control = batch.companions[PID]
    assert isinstance(control, Control)
    control.standing = replace(rewards((100, 0.5)), kl=0.9)
    return batch, objective


def test_the_coefficient_is_the_slope_of_the_penalty_in_this_steps_kl() -> None:
    """dP / dk by differences: k enters k_short by a tenth; with share=1 it is dP / d k_short."""
    batch, _ = opened(step(1, False, ("reference",)))
    state = batch.companions[PID]
    assert isinstance(state, Control)
    now, entropy = PID.reads(batch, state.standing)
    kl = LogRatio("live", "reference")(batch)[batch.mask].mean().item()
    reward = batch.reward.mean().item()

    def paid(k: float) -> float:
        return PID.penalty(state.standing.after(k, reward, PID.gains), entropy)[0]

    slope = Pull(PID, 0.1)(batch).item()
    assert paid(kl) > 0 and now.kl == pytest.approx(0.81 + 0.1 * kl, rel=1e-12)
    assert slope == pytest.approx((paid(kl + 1e-5) - paid(kl - 1e-5)) / 2e-5, rel=1e-6)
    assert Pull(PID, 1.0)(batch).item() == pytest.approx(10 * slope, rel=1e-12)
    assert state.standing.kl == 0.9  # reading it moves nothing


def test_expected_the_penalty_has_the_gradient_of_the_kl_to_the_reference() -> None:
    """Summed over what one token could be: coefficient * d KL(student || reference)."""
    g = torch.Generator().manual_seed(2)
    s, ref = torch.randn(2, 1, 1, 5, generator=g, dtype=torch.float64)
    p, apart = s[0, 0].softmax(-1), s[0, 0].log_softmax(-1) - ref[0, 0].log_softmax(-1)
    expected, total = p * (apart - (p * apart).sum()), torch.zeros(5).double()
    term = load("safe").objective.terms[2]
    for y in range(5):
        case = Case(torch.tensor([[y]]), s, models={"reference": ref}, columns={"reward": [0.5]})
        batch = case.batch(Objective(term))
        control = batch.companions[PID]
        assert isinstance(control, Control)
        control.standing = replace(rewards((100, 0.5)), kl=5.0)
        coefficient = Pull(PID, 0.1)(batch).item()
        out = case.run(Objective(term), companions=batch.companions)
        assert out.loss.item() == pytest.approx(coefficient * apart[y].item(), rel=1e-12)
        total += p[y] * out.grad[0, 0] / coefficient
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------- a naive reference


@pytest.mark.parametrize("fresh", [True, False], ids=["on policy", "off policy"])
def test_equal_to_a_dense_reference(fresh: bool) -> None:
    """Loss, gradient in the student, and in the heads; the hidden states are the logits."""
    case = step(7, fresh, ("reference",))
    batch, objective = opened(case, share=1.0)
    twins = batch.companions[HEAD].module  # type: ignore[attr-defined]
    assert case.mask is not None and case.before is not None and case.sampler is not None
    mask, reward = case.mask, torch.as_tensor(case.columns["reward"])
    leaf = case.student.clone().requires_grad_()
    logps = leaf.log_softmax(-1)
    logp, before, sampler, ref = (
        at(x.log_softmax(-1), case.tokens)
        for x in (leaf, case.before, case.sampler, case.models["reference"])
    )

    def standard(x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.std(correction=0) + 1e-6)

    last = [int(mask[b].nonzero()[-1]) for b in range(6)]
    old = twins(case.before[range(6), last])[:, 0].detach()
    v = twins(case.student[range(6), last])[:, 0]
    worth = standard(reward)
    a = standard(worth - old)[:, None]
    r = (logp - before).exp()
    policy = (before - sampler).exp() * -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    near = old + (v - old).clamp(-0.2, 0.2)
    value = (huber_loss(v, worth, delta=0.5) + huber_loss(near, worth, delta=0.5)) / 2
    entropy = -(logps.exp() * logps).sum(-1)
    kl, h = (logp - ref)[mask].mean().item(), entropy[mask].mean().item()
    k_short = 0.9 * 0.9 + 0.1 * kl
    steer = 0.3 * (error := 0.05 * (reward.mean().item() - 0.5) - 0.001)
    state = batch.companions[PID]
    assert isinstance(state, Control)
    integral, before_error = state.standing.integral, state.standing.error
    steer += 0.01 * (integral + error) + 0.05 * (error - before_error)
    tau = (0.3 + steer) * 0.8
    coefficient = 2 * 0.1 * max(0.5, 2.0 / (h + 0.1)) * (k_short - tau)
    apart = logp - ref
    loss = (
        policy[mask].mean()
        + 0.5 * value
        + coefficient * (apart.square() / 2 + (apart - apart.square() / 2).detach())[mask].mean()
        - 0.01 * entropy[mask].mean()
    )
    leaves = [leaf, *twins.parameters()]
    grads = torch.autograd.grad(loss, leaves)
    out = case.run(objective, chunk=3, companions=batch.companions)
    assert coefficient > 1e-2
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(out.grad, grads[0], rtol=1e-8, atol=1e-8)
    for parameter, grad in zip(twins.parameters(), grads[1:], strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-8)


def test_the_value_is_read_at_the_last_token_and_the_advantage_is_one_per_rollout() -> None:
    batch, _ = opened(step(8, True, ("reference",)))
    last = LastToken()(batch)
    assert last.sum(1).tolist() == [1] * 6 and (last & ~batch.mask).sum() == 0
    assert last.nonzero()[:, 1].tolist() == [int(m.nonzero()[-1]) for m in batch.mask]
    x = Standard(Reward())(batch)
    assert x.shape == (6, 1) and abs(x.mean().item()) < 1e-12
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert LogpFact("live") in batch.facts


@pytest.mark.parametrize("arguments", [{}, {"share": 1.0}, {"clip": None}, {"tau0": 0.01}])
def test_check(arguments: dict[str, Any]) -> None:
    check(load("safe", **arguments))


def test_what_it_says() -> None:
    made = load("safe", kp=0.5, critic_learning_rate=1e-4)
    found = made.needs.companions
    assert found == {TwinHead(learning_rate=1e-4), Controller(gains=(0.5, 0.01, 0.05))}
    assert made.opened == {"reference"} and dict(made.arguments)["clip"] == (0.2, 0.2)
    for name in ("tau0", "floor", "share", "critic_learning_rate"):
        with pytest.raises(Exception, match=f"{name}=0.0 must be positive"):
            load("safe", **{name: 0.0})
