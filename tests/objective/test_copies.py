"""Copies of the student: they follow as said (PITFALLS S2: rate 1 is a hard copy, 0 is frozen), and
their passes leave the student alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.models.body import head_of
from opdkit.models.layout import Layout
from opdkit.objective import (
    Around,
    Batch,
    Companion,
    Companions,
    Ema,
    Likelihood,
    LogpFact,
    LogRatio,
    Previous,
    Snapshot,
    Stepped,
)
from opdkit.objective.head import flat_positions
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel
from opdkit.testing import evaluate
from opdkit.train.gather import collate, gather
from opdkit.train.settings import Lora
from opdkit.train.student import with_adapters
from tests.common.tiny import tiny_model
from tests.train.rows import rollouts

MASK = torch.ones(1, 1, dtype=torch.bool)


def build(model: Any, *specs: Companion) -> Companions:
    around = Around(
        lambda name: 32,
        torch.device("cpu"),
        torch.float32,
        model=model,
        scorer=lambda copy: LocalModel(copy, head_of(copy)),
    )
    return Companions.build(specs, around)


def learning(model: Any) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def walk(model: Any, companions: Companions, steps: int, first: int = 1) -> list[dict[str, Any]]:
    """The student's weights before and after each of some optimiser steps."""
    seen = [{n: p.detach().clone() for n, p in learning(model).items()}]
    g = torch.Generator().manual_seed(first)
    for updates in range(first, first + steps):
        with torch.no_grad():
            for p in learning(model).values():
                p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
        companions.after_step(Stepped(None, MASK, updates=updates, model=model))
        seen.append({n: p.detach().clone() for n, p in learning(model).items()})
    return seen


def test_closed_form() -> None:
    """After n steps (1 - r)^n w_0 + r sum_i (1 - r)^(n - i) w_i, in float64."""
    rate, n, model = 0.3, 5, tiny_model(layers=1).double()
    companions = build(model, Ema(rate))
    w = walk(model, companions, n)
    copy = companions[Ema(rate)].weights  # type: ignore[attr-defined]
    for name in copy:
        expected = (1 - rate) ** n * w[0][name]
        for i in range(1, n + 1):
            expected += rate * (1 - rate) ** (n - i) * w[i][name]
        torch.testing.assert_close(copy[name], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("ema", "is_that_of"),
    [
        *[(Ema(1.0), 5), (Ema(0.0), 0), (Ema(1.0, every=2), 4), (Ema(1.0, 6), 0)],
        # the first move is all of the way, no other is
        *[(Ema(0.0, first_copy=True), 1), (Ema(0.0, every=2, first_copy=True), 2)],
    ],
)
def test_edges_are_exact(ema: Ema, is_that_of: int) -> None:
    """After five steps, to the bit; a copy every so many steps is a synchronised one."""
    model = tiny_model(layers=1)
    companions = build(model, ema)
    w = walk(model, companions, 5)
    for name, weight in companions[ema].weights.items():  # type: ignore[attr-defined]
        assert torch.equal(weight, w[is_that_of][name])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"rate": 1.1}, "between 0"), ({"rate": -0.1}, "between 0"), ({"every": 0}, "at least 1")],
)
def test_what_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Ema(**wrong)


def test_saved_and_resumed_it_is_the_copy_that_was_never_interrupted(tmp_path: Any) -> None:
    model = tiny_model(layers=1)
    whole, again = build(model, Ema(0.3)), build(model, Ema(0.3))
    walk(model, whole, 3)
    torch.save(whole.state_dict(), tmp_path / "file")
    again.load_state_dict(torch.load(tmp_path / "file", weights_only=True))
    saved = {n: p.detach().clone() for n, p in learning(model).items()}
    for companions in (whole, again):
        with torch.no_grad():
            for name, p in learning(model).items():
                p.copy_(saved[name])
        walk(model, companions, 2, first=4)
    a, b = (c[Ema(0.3)].weights for c in (whole, again))  # type: ignore[attr-defined]
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = build(tiny_model(layers=2), Ema(0.3))
    with pytest.raises(UserError, match="other names than the student's"):
        other.load_state_dict(whole.state_dict())


def test_below_adapters_the_weights_are_shared_and_only_adapters_follow() -> None:
    model = with_adapters(tiny_model(), Lora(r=4))
    companions = build(model, Ema(1.0))
    state: Any = companions[Ema(1.0)]
    mine, copied = dict(model.named_parameters()), dict(state.model.named_parameters())
    for name, p in mine.items():
        assert (copied[name] is p) == (not p.requires_grad)
        assert not copied[name].requires_grad
    assert any("lora_" in name for name in state.weights)
    assert set(state.state_dict()) == set(learning(model))
    walk(model, companions, 2)
    for name, p in learning(model).items():
        assert torch.equal(state.weights[name], p)
    # and the copy's own passes see its adapters, not the student's
    rows = rollouts()
    layout, batch = Layout(rows, 8), collate(rows, "cpu", torch.float32)
    positions = flat_positions(batch.mask)
    before = state.source(layout, positions).logits(positions)
    with torch.no_grad():
        for p in learning(model).values():
            p += 1.0
    assert torch.equal(state.source(layout, positions).logits(positions), before)
    student = LocalModel(model, head_of(model)).source(layout, positions).logits(positions)
    assert not torch.equal(student, before)


def test_its_passes_leave_the_student_alone() -> None:
    """Its gradients, its train mode with dropout, its random state; and the copy drops nothing."""
    model = with_adapters(tiny_model(), Lora(r=4, dropout=0.5)).train()
    for p in learning(model).values():
        torch.nn.init.normal_(p, std=0.1)
        p.grad = torch.ones_like(p)
    companions = build(model, Ema(1.0))
    scorers = {"ema": companions.scorers["ema"]}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()

    def scored() -> Any:
        return gather(rollouts(), Needs(frozenset({LogpFact("ema")})), scorers).facts[
            LogpFact("ema")
        ]

    first = scored()
    assert torch.equal(first, scored()) and first.abs().sum() > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes and any(modes)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in learning(model).values())  # type: ignore[arg-type]
    model.eval()
    own = gather(
        rollouts(),
        Needs(frozenset({LogpFact("reference")})),
        {"reference": LocalModel(model, head_of(model))},
    ).facts[LogpFact("reference")]
    assert torch.equal(first, own)  # a copy of the same weights says the same, to the bit


def test_on_plain_logits_it_is_a_model_by_name() -> None:
    logits = torch.zeros(1, 2, 4)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    ema = torch.tensor([3.0, 0.0, 0.0, 0.0]).log1p().expand(1, 2, 4)  # e^z = 4, 1, 1, 1
    out = evaluate(Likelihood() * LogRatio("ema", "student"), logits, tokens, models={"ema": ema})
    # log(4/7) - log(1/4)
    assert out.terms[0].weight.tolist() == [[pytest.approx(0.826679), pytest.approx(0.826679)]]
    with pytest.raises(UserError, match=r"bring it with the method, Method\(objective, companions"):
        Companions.build([Ema()], Around(lambda name: 8, torch.device("cpu"), torch.float32))


Weights = dict[str, torch.Tensor]
UPDATES = [2, 1, 3, 1, 2]  # optimiser steps of each step of a run


def follow(
    model: Any, companions: Companions, steps: range
) -> tuple[list[Weights], list[list[Weights]]]:
    """The student, and what its copies are, before each of these steps of a run and after the last;
    how the student moves is a matter of the step alone.
    """

    def weights(of: Any) -> Weights:
        return {n: p.detach().clone() for n, p in of.items()}

    students, copies = [], []
    for step in [*steps, None]:
        students.append(weights(learning(model)))
        states: list[Any] = list(companions.values())
        copies.append([weights(state.weights) for state in states])
        for number in range(0 if step is None else UPDATES[step]):
            g = torch.Generator().manual_seed(10 * (step or 0) + number)
            with torch.no_grad():
                for p in learning(model).values():
                    p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
            batch = Batch(MASK.long(), MASK, step=step or 0)
            companions.after_step(Stepped(batch, MASK, model=model))
    return students, copies


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_previous_student_is_that_of_the_step_before_however_many_updates_it_took() -> None:
    model = tiny_model(layers=1)
    students, copies = follow(model, build(model, Previous()), range(5))
    before = [students[0], *students[:-1]]
    assert all(same(now, expected) for (now,), expected in zip(copies, before, strict=True))
    assert not same(students[0], students[1])


@pytest.mark.parametrize("at", [0, 1, 3, 5, 9])
def test_a_snapshot_is_the_student_at_the_start_of_its_step(at: int) -> None:
    """From there on, and before it the student as it began; at 0 and after the end always that."""
    model = tiny_model(layers=1)
    students, copies = follow(model, build(model, Snapshot(at)), range(5))
    for step, (copy,) in enumerate(copies):
        assert same(copy, students[at if 0 < at <= step else 0])


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_both_continue_where_they_were_saved(cut: int, tmp_path: Any) -> None:
    """Killed between two steps, on either side of the one at which the anchor moves."""
    specs = (Snapshot(2), Previous())
    whole, broken = (with_adapters(tiny_model(), Lora(r=4)) for _ in range(2))
    _, expected = follow(whole, build(whole, *specs), range(5))
    companions = build(broken, *specs)
    follow(broken, companions, range(cut))
    torch.save(companions.state_dict(), tmp_path / "file")
    again = build(broken, *specs)  # copies of the student as it is now, until they are loaded
    again.load_state_dict(torch.load(tmp_path / "file", weights_only=True))
    _, found = follow(broken, again, range(cut, 5))
    for mine, theirs in zip(found, expected[cut:], strict=True):
        assert all(same(a, b) for a, b in zip(mine, theirs, strict=True))


def test_how_many_copies_they_are() -> None:
    assert (Snapshot().copies, Previous().copies, Ema().copies) == (1, 2, 1)
