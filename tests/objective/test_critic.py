"""Losses that read hidden states and own a module: value and every gradient equal a dense graph,
however the step is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opdkit.objective import (
    Around,
    Batch,
    ColumnFact,
    Companion,
    Companions,
    Divergence,
    HiddenFact,
    LogpFact,
    LogRatio,
    Objective,
    PolicyGradient,
    Reward,
    RolloutLoss,
    Stepped,
    TokenLoss,
    Trained,
    Value,
    ValueHead,
    ValueLoss,
)
from opdkit.objective.head import Head, Source, flat_positions, learn
from opdkit.objective.needs import needs
from opdkit.objective.supply import supply
from opdkit.testing import check, evaluate, fabricate

B, T, H, WIDE, V = 3, 5, 8, 6, 11
DOUBLE = torch.float64
HEAD = ValueHead(learning_rate=0.1)


@dataclass(frozen=True)
class Likeness(TokenLoss, Companion):
    """|P h_s - h_t|^2, P learnt: hidden states distilled across widths."""

    teacher: str = "teacher"

    def build(self, around: Around) -> Trained:
        widths = around.width("student"), around.width(self.teacher)
        return Trained(nn.Linear(*widths, device=around.device, dtype=around.dtype), 1e-3)

    def value(self, live: Any) -> Tensor:  # [n]
        apart = live.companion(self)(live.hidden) - live.hidden_of(self.teacher)
        return apart.square().sum(-1)


OBJECTIVE = (
    ValueLoss(Reward(), HEAD) * 0.7
    + (Likeness() * (Reward() > 0)).per("own")
    + Divergence("reverse_kl") * 0.3
)


def setting() -> tuple[Tensor, Head, Batch]:
    """Hidden states [B * T, H], the head and the batch of a step."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=DOUBLE)

    mask = torch.arange(T) < torch.tensor([5, 2, 4])[:, None]
    teacher = Source(random(B * T, WIDE), torch.arange(B * T), Head(random(V, WIDE)))
    columns = {ColumnFact("reward"): torch.tensor([1.0, 0.0, 0.5], dtype=DOUBLE)}
    batch = Batch(
        torch.randint(V, (B, T), generator=g), mask, columns, {"teacher": teacher}, dtype=DOUBLE
    )
    around = Around({"student": H, "teacher": WIDE}.__getitem__, torch.device("cpu"), DOUBLE)
    batch.companions = Companions.build([HEAD, Likeness()], around)
    return random(B * T, H), Head(random(V, H)), batch


def dense(hidden: Tensor, head: Head, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients, each formula written out over all positions in one graph."""
    mask, reward = batch.mask, batch.reward[:, None].expand(B, T)
    h = hidden.clone().requires_grad_()
    assert head.weight is not None
    weight = head.weight.clone().requires_grad_()
    value, projection = (batch.companion(c).module for c in (HEAD, Likeness()))
    owned = [*value.parameters(), *projection.parameters()]
    v = (h @ value.weight[0] + value.bias).view(B, T)
    apart = (h @ projection.weight.T + projection.bias - batch.sources["teacher"].hidden).view(
        B, T, WIDE
    )
    s = (h @ weight.T).log_softmax(-1).view(B, T, V)
    t = batch.sources["teacher"].logits(torch.arange(B * T)).log_softmax(-1).view(B, T, V)
    right = mask & (reward > 0)
    loss = (
        0.7 * ((v - reward).square() / 2)[mask].sum() / mask.sum()
        + apart.square().sum(-1)[right].sum() / right.sum()
        + 0.3 * (s.exp() * (s - t)).sum(-1)[mask].sum() / mask.sum()
    )
    leaves = [h, weight, *sorted(owned, key=lambda p: p.shape)]
    return loss, list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("parts", [[[0, 1, 2]], [[2], [0, 1]], [[1], [2], [0]]], ids=str)
def test_equal_to_a_dense_graph(chunk: int | None, parts: list[list[int]]) -> None:
    """In 64 bits, up to the order of sums; the gradients of micro-batches add up in `grad`, as the
    student's do.
    """
    hidden, head, batch = setting()
    loss, expected = dense(hidden, head, batch)
    assert head.weight is not None
    leaf, weight = hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    plan, total = OBJECTIVE.plan(batch), torch.zeros((), dtype=DOUBLE)
    for rows in parts:
        inside = torch.zeros(B, 1, dtype=torch.bool).index_fill(0, torch.tensor(rows), True)
        positions = flat_positions(plan.selected & inside)
        learned = learn(plan, positions, leaf[positions], replace(head, weight=weight), chunk)
        learned.loss.backward()
        total += learned.loss.detach()
    owned = sorted(batch.companions.parameters, key=lambda p: p.shape)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip([leaf, weight, *owned], expected, strict=True):
        assert ours.grad is not None and theirs.norm() > 0
        assert (ours.grad - theirs).norm() <= 1e-12 * theirs.norm()


def test_a_detached_hidden_state_moves_the_head_alone() -> None:
    """Nothing is read off the logits then, and each term's gradient there is zero."""
    hidden, head, batch = setting()
    assert not needs(Objective(Divergence("reverse_kl"))).hidden
    assert needs(Objective(ValueLoss(Reward(), HEAD))).hidden
    plan = Objective(ValueLoss(Reward(), HEAD, into_student=False)).plan(batch)
    positions = flat_positions(plan.selected)
    leaf = hidden.clone().requires_grad_()
    learned = learn(plan, positions, leaf[positions], head, term_gradients=True)
    learned.loss.backward()
    assert learned.slopes.tolist() == [0.0] and leaf.grad is not None
    assert (leaf.grad == 0).all() and batch.companion(HEAD).module.weight.grad.norm() > 0


def test_the_projection_is_asked_for_and_the_teachers_hidden_states_are_kept() -> None:
    found = needs(OBJECTIVE)
    assert found.companions == {HEAD, Likeness()} and HiddenFact("teacher") in found.facts
    assert found.kept("teacher") and not found.kept("student")


@pytest.mark.parametrize(
    "objective",
    [
        PolicyGradient(LogRatio("teacher", "student") + Reward() - Value()) + ValueLoss(Reward()),
        OBJECTIVE,
    ],
    ids=["critic", "hidden states"],
)
def test_check_passes(objective: Objective) -> None:
    report = check(objective)
    assert "state beside the student continues where it was saved" in report.passed
    assert not any("constant" in rule for rule in report.passed)  # it says nothing of hidden states


def test_padding_changes_no_gradient_of_the_head() -> None:
    """Two columns of anything behind a mask, and another row order, which `check` tries too."""
    case = fabricate(Objective(ValueLoss(Reward(), HEAD)))
    order = torch.tensor([3, 5, 0, 1, 4, 2])

    def slopes(change: Any) -> list[Tensor]:
        out = evaluate(
            ValueLoss(Reward(), HEAD),
            change(case.student, 0.3),
            change(case.tokens, 0),
            change(case.mask, False),
            reward=change(torch.tensor(case.columns["reward"])[:, None], None)[:, 0],
        )
        return [p.grad for p in out.companions.parameters if p.grad is not None]

    def moved(x: Tensor, fill: Any) -> Tensor:
        x = x[order]
        if fill is None:
            return x
        return torch.cat([x, torch.full_like(x[:, :2], fill)], 1)

    for a, b in zip(slopes(lambda x, _: x), slopes(moved), strict=True):
        assert (a - b).norm() <= 1e-12 * a.norm() and a.norm() > 0


def test_the_baseline_is_the_value_before_the_step() -> None:
    """As a fact it is gathered once: it stays when the head and the student have moved."""
    hidden, head, batch = setting()
    batch.sources["student"] = Source(hidden, torch.arange(B * T), head)
    (fact,) = (f for f in needs(Objective(PolicyGradient(-Value(HEAD)))).facts if f.companions)
    batch.facts.update(supply(batch, {fact}, flat_positions(batch.mask), chunk=2))
    linear = batch.companion(HEAD).module
    expected = (hidden @ linear.weight[0] + linear.bias).detach().view(B, T)
    expected = torch.where(batch.mask, expected, 0.0)
    torch.testing.assert_close(Value(HEAD)(batch), expected, rtol=1e-12, atol=1e-12)
    linear.weight.grad = torch.ones_like(linear.weight)
    batch.companions.after_step(Stepped(batch, batch.mask))
    torch.testing.assert_close(Value(HEAD)(batch), expected, rtol=1e-12, atol=1e-12)
    assert LogpFact("student") not in batch.facts  # nothing else was computed


def test_a_head_learns_what_it_is_told() -> None:
    """From hidden states that hold the answer: (v - r)^2 falls to a tenth in 200 steps."""
    hidden, head, batch = setting()
    batch.facts[ColumnFact("reward")] = torch.tensor([1.0, -1.0, 0.5], dtype=DOUBLE)
    hidden[:, 0] = batch.reward.repeat_interleave(T)
    plan, losses = Objective(ValueLoss(Reward(), HEAD)).plan(batch), []
    positions = flat_positions(plan.selected)
    for update in range(1, 201):
        learned = learn(plan, positions, hidden[positions], head)
        learned.loss.backward()
        losses.append(learned.loss.item())
        batch.companions.after_step(Stepped(batch, batch.mask, updates=update))
        assert all(p.grad is None for p in batch.companions.parameters)
    assert losses[-1] < 0.1 * losses[0]


@dataclass(frozen=True)
class Scaled(RolloutLoss, Companion):
    """-log sigmoid(+-a R / 2), a learnt and R the log-prob of a rollout, + where it is right."""

    def build(self, around: Around) -> Trained:
        return Trained(nn.Linear(1, 1, bias=False, dtype=around.dtype), 0.1)

    def value(self, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch) -> Tensor:  # [R]
        total = torch.where(mask, logp, 0.0).sum(1, keepdim=True) / 2
        sign = torch.where(batch.reward[rows] > 0, 1.0, -1.0)
        return -(batch.companion(self)(total)[:, 0] * sign).sigmoid().log()


def test_a_loss_over_rollouts_teaches_what_it_owns_once() -> None:
    """By hand: d/da of the mean over rollouts of -log sigmoid(s a R / 2) is the mean of
    -(1 - sigmoid(s a R / 2)) s R / 2; in any micro-batches, chunks and minibatches.
    """
    case = fabricate(Objective(Scaled()))
    mask, reward = case.mask, torch.tensor(case.columns["reward"])
    assert mask is not None
    logp = case.student.log_softmax(-1).gather(-1, case.tokens[..., None])[..., 0]
    half = torch.where(mask, logp, 0.0).sum(1) / 2 * torch.where(reward > 0, 1.0, -1.0)
    for rows in (None, [3, 4, 5], [0]):
        mine = half if rows is None else half[rows]
        for parts in (None, [[0, 4], [3, 1], [2, 5]], [[i] for i in range(6)]):
            for chunk in (1, None):
                out = case.run(Objective(Scaled()), parts, chunk, rows)
                (a,) = out.companions.parameters
                expected = -((1 - (a * mine).sigmoid()) * mine).mean()
                assert a.grad is not None
                assert a.grad.item() == pytest.approx(expected.item(), rel=1e-12)
    assert "micro-batches do not change it" in check(Scaled()).passed
