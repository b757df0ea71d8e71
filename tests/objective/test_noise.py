"""Noise on the layers of a real model: only where the student learns, the same however a step is
cut, and its widths learn.

The models are in float64, but their norms compute in float32 whatever they are given: numbers agree
to 1e-6.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.body import head_of, layers_of
from opdkit.models.layout import Layout
from opdkit.objective import (
    Around,
    Companions,
    LayerNoise,
    Likelihood,
    LogpFact,
    Objective,
    Stepped,
)
from opdkit.objective.head import flat_positions, learn
from opdkit.objective.maths import keyed_normal
from opdkit.objective.needs import needs
from opdkit.objective.noise import Noisy
from opdkit.teachers import LocalModel
from opdkit.testing import evaluate
from opdkit.train.gather import collate, gather, refresh
from opdkit.train.settings import Lora, Optim
from opdkit.train.student import Student, with_adapters
from tests.common.tiny import tiny_model
from tests.train.rows import naive_logps, rollouts

NOISE = LayerNoise(0.3)
NEAR = {"rtol": 1e-6, "atol": 1e-6}
CPU = torch.device("cpu")
KEYS = torch.tensor([5, -9, 1 << 60])


def opened(
    model: Any | None = None, noise: LayerNoise = NOISE, seed: int = 0
) -> tuple[Student, Companions]:
    student = Student((model or tiny_model(layers=3)).double(), Optim(), 1e-3, 10)
    around = Around(
        lambda name: 32, CPU, torch.float64, seed, student.model, layers=layers_of(student.model)
    )
    return student, Companions.build([noise], around)


def gradients(
    student: Student,
    companions: Companions,
    updates: int = 0,
    budget: int = 1000,
) -> list[Tensor]:
    """Log-probs [N] of all tokens in the learning pass, then the gradients of the widths and of
    every weight.
    """
    rows = rollouts()
    batch = collate(rows, CPU, torch.float64)
    batch.companions, logps = companions, torch.zeros(batch.tokens.numel()).double()
    plan = Objective(Likelihood()).plan(batch)
    positions = flat_positions(plan.selected)
    with student.learning(0), companions.disturbed(updates) as hear:
        layout = Layout(rows, batch.shape[1], hear)
        for part, padded in layout.passes(positions, budget, positions):
            states = layout.states(student.model, part, padded)
            learned = learn(plan, part, states, student.head)
            learned.loss.backward()
            logps[part] = learned.logp
    grads = [p.grad for p in [*companions.parameters, *student.parameters] if p.grad is not None]
    for parameter in [*companions.parameters, *student.parameters]:
        parameter.grad = None
    return [logps[positions], *grads]


# ------------------------------------------------------------------------------------------ draws


def test_the_draws_are_normal_and_depend_on_their_key_alone() -> None:
    """Moments of 10^6 draws within 5 standard errors; padding, row order, width and other rows
    change no bit.
    """
    many = keyed_normal(0, 3, "a", torch.arange(500), 40, 50).double()
    assert many.dtype == torch.float64 and abs(many.mean()) < 5e-3
    for power, moment, error in ((2, 1.0, 2**0.5), (3, 0.0, 15**0.5), (4, 3.0, 96**0.5)):
        assert abs((many**power).mean() - moment) < 5e-3 * error
    tail = (many.abs() > 3).double().mean().item()
    assert abs(tail - math.erfc(3 / 2**0.5)) < 3e-4
    neighbours = ((many[..., 1:] * many[..., :-1]).mean(), (many[:, 1:] * many[:, :-1]).mean())
    assert all(abs(x) < 5e-3 for x in neighbours)
    x = keyed_normal(1, 2, "a", KEYS, 5, 8)
    assert torch.equal(keyed_normal(1, 2, "a", KEYS[[2, 0]], 9, 8)[:, :5], x[[2, 0]])
    assert torch.equal(keyed_normal(1, 2, "a", KEYS, 5, 7), x[..., :7])
    for other in ((0, 2, "a"), (1, 3, "a"), (1, 2, "b")):
        assert not torch.isclose(keyed_normal(*other, KEYS, 5, 8), x).any()


# ------------------------------------------------------------------------------------- in the pass


def test_a_hidden_state_before_a_layer_has_the_noise_of_its_row_and_place() -> None:
    """By hand: a model of one layer whose layer does nothing is the final norm of embedding +
    sigma xi.
    """
    student, companions = opened(tiny_model(layers=1), seed=4)
    with torch.no_grad():
        for name, weight in student.model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    rows, decoder = rollouts(), student.model.get_decoder()
    with torch.no_grad(), companions.disturbed(7) as hear:
        layout = Layout(rows, 8, hear)
        found = layout.states(student.model, torch.tensor([0, 4, 16, 17]), 30)
    keys = collate(rows, CPU, torch.float64).keys
    xi = keyed_normal(4, 7, "noise before layer 0", keys, 30, 32).double()
    # rollout 0 has a prompt of 3 tokens, rollout 2 of 1; a state predicts the token behind it
    for state, (b, place) in zip(found, [(0, 2), (0, 6), (2, 0), (2, 1)]):
        token = (rows[b].prompt + rows[b].tokens)[place]
        expected = decoder.norm(decoder.embed_tokens.weight[token] + 0.3 * xi[b, place])
        torch.testing.assert_close(state, expected.detach(), **NEAR)


@pytest.mark.parametrize("wrapped", [False, True], ids=["whole", "lora"])
def test_micro_batches_and_layers_computed_twice_are_given_the_same_noise(wrapped: bool) -> None:
    """Bit for bit with gradient checkpointing; to the order of sums however the rows are packed."""
    model = tiny_model(layers=3)
    model = with_adapters(model, Lora(r=4, targets=["q_proj"])) if wrapped else model
    student, companions = opened(model)
    whole = gradients(student, companions)
    for budget in (8, 24):
        for a, b in zip(whole, gradients(student, companions, budget=budget), strict=True):
            torch.testing.assert_close(a, b, **NEAR)
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
    if wrapped:
        student.model.enable_input_require_grads()
    again = gradients(student, companions)
    assert len(whole) == len(again) and all(map(torch.equal, whole, again))
    student.model.gradient_checkpointing_disable()
    assert not torch.isclose(gradients(student, companions, updates=1)[0], whole[0]).any()
    other = opened(copy.deepcopy(student.model), seed=1)
    assert not torch.isclose(gradients(*other)[0], whole[0]).any()


def test_without_width_it_is_the_student_itself() -> None:
    student, companions = opened(noise=LayerNoise(1e-200))
    logps = gradients(student, companions)[0]
    rows = rollouts()
    clean = [
        naive_logps(student.model, r).gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
        for r in rows
        if r.tokens
    ]
    torch.testing.assert_close(logps, torch.cat(clean), **NEAR)


def test_the_widths_have_the_gradient_of_the_loss_and_stay_positive() -> None:
    """Against differences of the loss in each log sigma; every step moves them, and exp keeps them
    above 0.
    """
    student, companions = opened()
    state = companions[NOISE]
    assert isinstance(state, Noisy)
    slope = gradients(student, companions)[1]
    assert slope.shape == (3,) and (slope != 0).all()
    for layer in range(3):
        losses = []
        for shift in (1e-3, -1e-3):
            with torch.no_grad():
                state.log_sigma[layer] += shift
            losses.append(-gradients(student, companions)[0].mean())
            with torch.no_grad():
                state.log_sigma[layer] -= shift
        assert (losses[0] - losses[1]).item() / 2e-3 == pytest.approx(slope[layer].item(), rel=2e-3)
    start = state.log_sigma.detach().clone()
    state.log_sigma.grad = torch.tensor([1.0, -1.0, 2.0]).double()
    state.after_step(Stepped(None, torch.ones(1, 1, dtype=torch.bool)))
    moved = (state.log_sigma - start).tolist()
    assert moved == pytest.approx([-5e-4, 5e-4, -5e-4], rel=1e-6)  # AdamW's first step
    assert (state.log_sigma.exp() > 0).all()


def test_only_the_layers_that_are_named_have_noise_and_a_width() -> None:
    student, companions = opened(noise=LayerNoise(0.3, (1, 2)))
    assert [p.shape for p in companions.parameters] == [(1,)]
    layers = layers_of(student.model)
    with companions.disturbed(0):
        assert [len(layer._forward_pre_hooks) for layer in layers] == [0, 1, 0]
    assert not any(layer._forward_pre_hooks for layer in layers)
    with pytest.raises(UserError, match=r"the student has 3 .*layers=\(start, end\) count"):
        opened(noise=LayerNoise(0.3, (0, 4)))
    for wrong in ((2, 2), (-1, 2), (), 1):
        with pytest.raises(ValueError, match="two integers with 0 <= start < end"):
            LayerNoise(0.3, wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="none on plain logits"):
        Companions.build([NOISE], Around(lambda name: 3, CPU, torch.float64))


def test_a_copy_made_before_and_every_other_pass_of_the_student_have_none() -> None:
    student, companions = opened()
    twin, rows = copy.deepcopy(student.model), rollouts()
    ids = torch.tensor([rows[0].prompt + rows[0].tokens])
    gradients(student, companions)
    with torch.no_grad():
        clean = copy.deepcopy(twin)(ids).logits
        assert torch.equal(student.model(ids).logits, clean)
        with companions.disturbed(0) as hear:
            hear(rows[:1])
            assert torch.equal(twin(ids).logits, clean)
            assert not torch.isclose(student.model(ids).logits, clean).all()


def test_facts_of_the_live_student_are_of_the_pass_that_it_learns_in() -> None:
    """Before the first update too: they are not those of the student that is scored."""
    student, companions = opened()
    rows = rollouts()
    live, before = LogpFact("live"), LogpFact("student")
    asked = needs(Objective(Likelihood()))
    asked = type(asked)(asked.facts | {live, before})
    local = LocalModel(student.model, head_of(student.model))
    scorers = {"student": local, "live": local}
    batch = gather(
        rows, asked, scorers, companions=companions, policy_version=1, dtype=torch.float64
    )
    assert live not in batch.facts
    refresh(batch, asked, scorers, rows, updates=3)
    learnt = gradients(student, companions, updates=3)[0]
    where = flat_positions(batch.mask)
    torch.testing.assert_close(batch.facts[live].flatten()[where], learnt, **NEAR)
    clean = gradients(*opened(student.model, LayerNoise(1e-200)))[0]
    torch.testing.assert_close(batch.facts[before].flatten()[where], clean, **NEAR)
    assert not torch.isclose(learnt, clean).any()


def test_plain_logits_have_no_layers_and_no_noise() -> None:
    logits, tokens = torch.randn(2, 3, 4).double(), torch.zeros(2, 3, dtype=torch.int64)
    assert not evaluate(Likelihood(), logits, tokens).companions
