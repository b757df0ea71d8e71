"""State beside the student: found by running the formula, built the same always, saved whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from opdkit import UserError
from opdkit.objective import (
    Around,
    Batch,
    ColumnFact,
    Companion,
    Companions,
    CompanionState,
    Fact,
    Likelihood,
    Objective,
    Reward,
    Signal,
    Stepped,
    Trained,
    Value,
    ValueHead,
    ValueLoss,
)
from opdkit.objective.needs import needs
from opdkit.testing import CheckFailed, check, evaluate

CPU = torch.device("cpu")
AROUND = Around(lambda model: 3, CPU, torch.float64)


@dataclass(frozen=True)
class Running(Companion):
    """A controller: the mean reward of the steps so far, as a weight."""

    start: float = 1.0

    def build(self, around: Around) -> RunningMean:
        return RunningMean(self.start)


class RunningMean(CompanionState):
    def __init__(self, start: float):
        self.mean, self.steps, self.rollouts = start, 0, 0

    def after_step(self, stepped: Stepped) -> None:
        self.steps += 1
        trained = stepped.mask.any(1)
        self.mean += (stepped.batch.reward[trained].mean().item() - self.mean) / self.steps
        self.rollouts += len(stepped.rollouts)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.mean, self.steps = state["mean"], state["steps"]


@dataclass(frozen=True)
class Mean(Signal):
    of: Running = Running()

    def value(self, batch: Batch) -> torch.Tensor:  # [1, 1]
        return torch.full((1, 1), batch.companion(self.of).mean, dtype=batch.dtype)


# ---------------------------------------------------------------------------------- how it is found


def test_what_losses_signals_and_facts_ask_for_is_found_and_equal_ones_are_one() -> None:
    objective = Objective(ValueLoss(Reward(), ValueHead(0.1)) * Mean()) + Likelihood() * Value()
    assert needs(objective).companions == {ValueHead(0.1), ValueHead(), Running()}
    same = ValueLoss(Reward(), ValueHead(0.1)) + Likelihood() * Value(ValueHead(0.1))
    assert needs(same).companions == {ValueHead(0.1)}
    assert needs(Objective(Likelihood())).companions == frozenset()


def test_what_a_fact_reads_without_naming_it_is_said() -> None:
    @dataclass(frozen=True)
    class Hidden(Fact):
        models = ("student",)

        def read(self, here: Any, first: Any) -> Any:
            return here.companion(ValueHead())(here.hidden_of("student"))[:, 0]

    @dataclass(frozen=True)
    class Reads(Signal):
        def value(self, batch: Batch) -> Any:
            return batch.read(Hidden())

    with pytest.raises(LookupError, match=r"ValueHead.* is not there: .*has to be a field of"):
        evaluate(Likelihood() * Reads(), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64))


def test_a_controller_weighs_a_loss_and_sees_the_step() -> None:
    """Rewards 1, 0 and 5 of which the step trained the first two: the mean moves to 1/2, and the
    loss with it.
    """
    logits, tokens = torch.zeros(3, 2, 4).double(), torch.zeros(3, 2, dtype=torch.int64)
    given = {"reward": [1.0, 0.0, 5.0]}
    objective = Likelihood() * Mean(Running(2.0)) * (Reward() > -1)
    out = evaluate(objective, logits, tokens, **given)  # type: ignore[arg-type]
    state = out.companions[Running(2.0)]
    facts = {ColumnFact("reward"): torch.tensor(given["reward"])}
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), facts)  # type: ignore[arg-type]
    batch.companions = out.companions
    assert Mean(Running(2.0))(batch).item() == 2.0
    out.companions.after_step(Stepped(batch, mask, rollouts=[None, None]))  # type: ignore[list-item]
    assert (state.mean, state.steps, state.rollouts) == (0.5, 1, 2)  # type: ignore[attr-defined]
    assert Mean(Running(2.0))(batch).item() == 2.0  # signals of a step are computed once
    batch.signals.clear()
    assert Mean(Running(2.0))(batch).item() == 0.5
    assert "state beside the student continues where it was saved" in check(objective).passed


# ---------------------------------------------------------------------------------- how it is built


def test_it_starts_the_same_whatever_was_drawn_before_and_whatever_stands_beside_it() -> None:
    def weight(*companions: Companion, seed: int = 0) -> torch.Tensor:
        torch.rand(3)
        before = torch.get_rng_state()
        around = Around(lambda model: 3, CPU, torch.float64, seed)
        made = Companions.build(companions, around)
        assert torch.equal(torch.get_rng_state(), before)
        return made[ValueHead()].module.weight.detach()  # type: ignore[attr-defined]

    alone = weight(ValueHead())
    assert torch.equal(alone, weight(ValueHead()))
    assert torch.equal(alone, weight(ValueHead(0.1), Running(), ValueHead()))
    assert not torch.equal(alone, weight(ValueHead(), seed=1))
    assert not torch.equal(alone, Companions.build([ValueHead(0.1)], AROUND).parameters[0])


def test_two_that_are_written_alike_are_refused() -> None:
    def another() -> Companion:
        @dataclass(frozen=True)
        class Running(Companion):
            start: float = 1.0

            def build(self, around: Around) -> RunningMean:
                return RunningMean(self.start)

        Running.__qualname__ = "Running"
        return Running()

    with pytest.raises(UserError, match=r"two companions are both written Running\(start=1.0\)"):
        Companions.build([Running(), another()], AROUND)


def test_a_state_that_a_checkpoint_cannot_hold_is_an_error_at_the_start() -> None:
    @dataclass(frozen=True)
    class Strange(Companion):
        def build(self, around: Around) -> CompanionState:
            class State(RunningMean):
                def state_dict(self) -> dict[str, Any]:
                    return {"seen": [1, {2, 3}]}

            return State(0.0)

    with pytest.raises(UserError, match=r"Strange\(\) holds a set, which checkpoints do not"):
        Companions.build([Strange()], AROUND)


def test_a_model_that_cannot_be_read_is_said() -> None:
    @dataclass(frozen=True)
    class Mute(Running):
        model: str = "mute"

    with pytest.raises(UserError, match=r"calls itself the model 'mute', .* no `source"):
        Companions.build([Mute()], AROUND).scorers  # noqa: B018


# ----------------------------------------------------------------------------------- how it is kept


def moved(state: Any, steps: int) -> None:
    """Optimiser steps on gradients that grow."""
    for number in range(1, steps + 1):
        for parameter in state.parameters():
            parameter.grad = torch.full_like(parameter, float(number))
        state.after_step(Stepped(None, torch.ones(1, 1, dtype=torch.bool)))


def test_a_trained_module_continues_where_it_was_saved(tmp_path: Path) -> None:
    """With the moments of its optimiser: the next step is the same to the bit."""
    whole, again = (Companions.build([ValueHead()], AROUND) for _ in range(2))
    moved(whole[ValueHead()], 3)
    torch.save(whole.state_dict(), tmp_path / "file")
    again.load_state_dict(torch.load(tmp_path / "file", weights_only=True))
    for companions in (whole, again):
        moved(companions[ValueHead()], 2)
    for a, b in zip(whole.parameters, again.parameters, strict=True):
        assert torch.equal(a, b)


def test_the_state_of_another_method_is_refused() -> None:
    saved = Companions.build([ValueHead(0.5)], AROUND).state_dict()
    mine = Companions.build([ValueHead(0.1)], AROUND)
    with pytest.raises(
        UserError,
        match=r"holds the state of ValueHead\(learning_rate=0.5\), and this run has ValueHead\("
        r"learning_rate=0.1\) beside",
    ):
        mine.load_state_dict(saved)
    with pytest.raises(UserError, match="holds the state of nothing, and this run has ValueHead"):
        mine.load_state_dict({})
    with pytest.raises(UserError, match="and this run has nothing beside its student"):
        Companions().load_state_dict(saved)
    wide = Companions.build([ValueHead(0.1)], Around(lambda model: 4, CPU, torch.float64))
    with pytest.raises(UserError, match=r"its state of ValueHead\(.* it can continue from"):
        mine.load_state_dict(wide.state_dict())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    companions = Companions.build([ValueHead(), Running()], AROUND)
    companions.refuse_broken()  # no gradient yet
    companions.parameters[0].grad = torch.tensor([[0.0, bad, 0.0]]).double()
    with pytest.raises(UserError, match=r"gradient of ValueHead\(.* is not finite"):
        companions.refuse_broken()


def test_the_module_computes_in_its_own_dtype_under_autocast() -> None:
    trained = Trained(nn.Linear(3, 1), 0.1)
    x = torch.tensor([[1.0, 1e-4, 3.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert trained.module(x).dtype == torch.bfloat16
        inside = trained(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, trained(x))


def test_check_finds_state_that_is_not_saved_whole() -> None:
    @dataclass(frozen=True)
    class Forgets(ValueHead):
        def build(self, around: Around) -> Trained:
            class State(Trained):
                """Whose optimiser begins anew."""

                def state_dict(self) -> dict[str, Any]:
                    return {"module": self.module.state_dict()}

                def load_state_dict(self, state: Any) -> None:
                    self.module.load_state_dict(state["module"])

            return State(nn.Linear(around.width("student"), 1, dtype=around.dtype), 0.1)

    assert "saved" in str(check(ValueLoss(Reward(), ValueHead())))
    with pytest.raises(CheckFailed, match="FAIL  state beside the student continues"):
        check(ValueLoss(Reward(), Forgets()))


def test_check_finds_a_gradient_that_depends_on_micro_batches() -> None:
    """A head that divides by the number of positions of a chunk: the student's own gradient is
    none, its head's tells.
    """

    @dataclass(frozen=True)
    class Split(ValueLoss):
        def value(self, live: Any) -> torch.Tensor:  # [n]
            v = live.companion(self.head)(live.hidden.detach())[:, 0]
            return (v - v.mean()).square() + live.logp * 1e-30 - live.logp.detach() * 1e-30

    with pytest.raises(CheckFailed, match="FAIL  micro-batches do not change it"):
        check(Split(Reward()))
