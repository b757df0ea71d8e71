"""What an objective reads at a step: nothing of terms whose schedule has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import opdkit
from opdkit.models.body import head_of
from opdkit.models.layout import Layout
from opdkit.objective import Batch, Divergence, Likelihood, Mark, Objective, Reward, Signal
from opdkit.objective.facts import ColumnFact, VocabularyFact
from opdkit.objective.needs import _Probe, idle, needs
from opdkit.teachers import LocalModel
from opdkit.train.gather import gather
from tests.common.tiny import tiny_model
from tests.train.rows import rollouts


@dataclass(frozen=True)
class Until(Signal):
    """[1, 1]: 1 before a step, 0 from it on."""

    step: int

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        return torch.full((1, 1), float(batch.step < self.step))


@dataclass(frozen=True)
class Zero(Signal):
    """[1, 1]: 0 times the mean of another signal, which is read all the same."""

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        return 0 * self.of(batch).float().mean().view(1, 1)


PULL = Divergence("forward_kl")


@dataclass(frozen=True)
class Late(Signal):
    """[B, T]: reads a mark of its own from a step on."""

    step: int

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        return Mark("late" if batch.step >= self.step else "early")(batch)


def test_what_a_formula_reads_only_late_is_found() -> None:
    read = needs(Objective(Likelihood() * Late(50_000))).facts
    assert {ColumnFact("mark:late"), ColumnFact("mark:early")} <= read


def test_a_formula_that_does_not_ask_the_step_is_run_once() -> None:
    """On as many made-up batches as it may read differently."""
    for factor, runs in ((Mark("key"), 1), (Late(3), len(_Probe.STEPS))):
        with mock.patch.object(
            _Probe, "__init__", autospec=True, side_effect=_Probe.__init__
        ) as made:
            needs(Objective(Likelihood() * Zero(factor)))
        assert made.call_count == runs


def test_a_term_is_idle_once_a_factor_that_reads_nothing_is_zero() -> None:
    both = Objective(Likelihood(), PULL * Mark("key") * Until(3) * 0.5)
    assert idle(both, 2, 10) == frozenset() and idle(both, 3, 10) == {1}
    assert VocabularyFact("teacher") in needs(both, idle(both, 2, 10)).facts
    ended = needs(both, idle(both, 3, 10))
    assert "teacher" not in ended.models
    # what its weight reads is still there to be weighed with
    assert ColumnFact("mark:key") in ended.facts


def test_a_zero_that_is_read_off_the_rollouts_is_no_schedule() -> None:
    """It may be another at the next step, or only on facts that are made up."""
    assert idle(Objective(PULL * Zero(Reward()) * Reward()), 0, 10) == frozenset()
    assert idle(Objective(PULL * (Until(3) + Mark("key"))), 5, 10) == frozenset()


def test_the_share_of_the_run_is_that_of_this_run() -> None:
    """paced's two stages: one divergence in each half."""
    halves = opdkit.load("paced", two_stage=True).objective
    assert [idle(halves, step, 10) for step in (0, 4, 5, 9)] == [{1}, {1}, {0}, {0}]


class Counted:
    """A scorer that counts how often it is asked."""

    def __init__(self, scorer: Any) -> None:
        self.scorer, self.asked = scorer, 0

    def source(self, layout: Layout, positions: Tensor) -> Any:
        self.asked += 1
        return self.scorer.source(layout, positions)


@pytest.mark.parametrize(("step", "passes"), [(0, 1), (39, 1), (40, 0), (200, 0)])
def test_trace_makes_no_pass_of_its_teacher_after_the_hand_over(step: int, passes: int) -> None:
    """And what is left is GRPO, weights and facts alike: 40 = start + length."""
    models = {n: tiny_model(seed=s).double() for n, s in (("student", 1), ("teacher", 2))}
    teacher = Counted(LocalModel(models["teacher"], head_of(models["teacher"])))
    student = LocalModel(models["student"], head_of(models["student"]))
    objective = opdkit.load("trace").objective
    rows = rollouts(reward=1.0, correct=True)
    batch = gather(
        rows,
        needs(objective, idle(objective, step, 100)),
        {"student": student, "teacher": teacher},
        step=step,
        total_steps=100,
        dtype=torch.float64,
    )
    assert teacher.asked == passes
    grpo, pull = objective.plan(batch).parts
    assert torch.equal(grpo.weight, batch.mask.double())  # no token is marked
    assert not bool(pull.weight.any())


@pytest.mark.parametrize("usual", [torch.float64, torch.bfloat16], ids=str)
def test_it_reads_the_same_whatever_numbers_torch_makes_by_default(usual: torch.dtype) -> None:
    """A script that loads its models in bfloat16 may have set that for all of torch."""
    names = ("gkd", "gold", "dmpo", "f_dpo", "safe", "salsa", "sinkd")
    every = [opdkit.load(name).objective for name in names]
    expected = [needs(objective) for objective in every]
    torch.set_default_dtype(usual)
    try:
        assert [needs.__wrapped__(objective) for objective in every] == expected
    finally:
        torch.set_default_dtype(torch.float32)
