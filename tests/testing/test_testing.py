"""`evaluate` keeps its contract, and `check` finds each fault it is there to find."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from opdkit.objective.facts import ColumnFact, LogpFact
from opdkit.objective.formula import Signal
from opdkit.objective.grammar import Objective, RolloutLoss, TokenLoss
from opdkit.objective.losses import Divergence, Likelihood, PolicyGradient
from opdkit.objective.signals import (
    Correct,
    Draw,
    Entropy,
    Exp,
    LogRatio,
    Mark,
    Progress,
    Reward,
    Row,
)
from opdkit.testing import CheckFailed, check, evaluate, fabricate
from tests.methods.toy import P_S, P_T, binary, close, logits, tokens

CREDIT = LogRatio("teacher", "student")
S, T = logits(P_S), {"teacher": logits(P_T)}


# ----------------------------------------------------------------------------------------- evaluate


def test_what_comes_back():
    out = evaluate("opd", S, tokens(0), models=T)  # a name will do
    term = out.terms[0]
    assert close(out.loss, 0.916291) and out.grad.shape == S.shape and len(out.terms) == 1
    assert (
        term.name == "policy_gradient"
        and term.weight.tolist() == [[1]]
        and term.denominator == 1
        and term.value == out.loss
    )
    assert (
        close(term.credit, [[-0.916291]])
        and evaluate("gkd", S, tokens(0), models=T).terms[0].credit is None
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_goes_through(dtype):
    out = evaluate("gkd", S.to(dtype), tokens(0), models={"teacher": T["teacher"].to(dtype)})
    assert out.grad.dtype == dtype and out.loss.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    assert close(
        out.loss.double(), 0.050875, {torch.float64: 6, torch.float32: 5, torch.bfloat16: 2}[dtype]
    )  # of 15, 7 and 2 digits


def test_defaults_of_before_and_sampler():
    live, before, sampler = (binary([x]) for x in (-1.0, -1.2, -1.5))
    loss, t = (
        PolicyGradient(LogRatio("student", "sampler") + LogRatio("teacher", "student")),
        {"teacher": binary([-0.7])},
    )
    assert close(evaluate(loss, live, tokens(0), models=t).loss, -(1.0 - 0.7), 9)
    assert close(
        evaluate(loss, live, tokens(0), models=t, before_logits=before).loss,
        -math.exp(0.2) * 0.5,
        9,
    )
    both = evaluate(loss, live, tokens(0), models=t, before_logits=before, sampler_logits=sampler)
    assert close(both.loss, -math.exp(0.5) * (0.3 + 0.5), 9)


def test_columns_marks_and_schedules():
    s, ids = logits(P_S).expand(2, 1, 3), torch.zeros(2, 1, dtype=torch.int64)
    weight = evaluate(Likelihood() * Reward(), s, ids, reward=[2.0, -1.0]).terms[0].weight
    assert weight.tolist() == [[2], [-1]]
    # reward > 0
    assert evaluate(Likelihood() * Correct(), s, ids, reward=[2.0, -1.0]).terms[
        0
    ].weight.tolist() == [[1], [0]]
    assert evaluate(
        Likelihood() * Correct(), s, ids, reward=[2.0, -1.0], correct=[False, True]
    ).terms[0].weight.tolist() == [
        [0],
        [1],
    ]
    assert evaluate(
        Likelihood() * Mark("guided"), s, ids, marks={"guided": [[True], [False]]}
    ).terms[0].weight.tolist() == [
        [1],
        [0],
    ]
    assert (
        evaluate(Likelihood() * Progress(), s, ids, step=1, total_steps=5).terms[0].weight.tolist()
        == [[0.25]] * 2
    )


def test_plain_numbers_keep_all_their_digits():
    """0.1 is that of float64, not of float32, which is 1.5e-9 more."""
    for numbers in ([0.1], torch.tensor([0.1], dtype=torch.float64)):
        for column, how in ((Reward(), {"reward": numbers}), (Row("x"), {"rows": {"x": numbers}})):
            out = evaluate(Objective(Likelihood() * column), S, tokens(0), **how)
            assert out.terms[0].weight.item() == 0.1


def test_uniforms_and_seeds():
    x = logits(P_S).expand(64, 1, 3)
    ids, loss = (
        torch.zeros(64, 1, dtype=torch.int64),
        Likelihood() * Draw(Exp(Entropy("student")) / 6),
    )
    a, b, c = (evaluate(loss, x, ids, seed=s).terms[0].weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    u = torch.linspace(0, 0.99, 64, dtype=torch.float64)[:, None]
    p = Exp(Entropy("student")) / 6
    given = evaluate(loss, x, ids, uniform=u).terms[0].weight
    assert torch.equal(given > 0, u < evaluate(Likelihood() * p, x, ids).terms[0].weight)


def test_inputs_are_left_alone():
    student = S.clone().requires_grad_()
    copy, models = student.detach().clone(), {"teacher": T["teacher"].clone()}
    evaluate("tropd", student, tokens(0), models=models)
    assert (
        torch.equal(student.detach(), copy)
        and student.grad is None
        and torch.equal(models["teacher"], T["teacher"])
    )


# ------------------------------------------------------------------- check finds what is wrong with


@dataclass(frozen=True)
class Unmasked(Signal):
    """Normalised over all positions, the padding with them."""

    of: Signal

    def value(self, batch):
        values = self.of(batch).abs() + batch.tokens.to(batch.dtype) / 100
        return values / values.sum()


@dataclass(frozen=True)
class ByRow(Signal):
    """The index of a rollout in its batch."""

    def value(self, batch):
        return 1 + torch.arange(len(batch.tokens), dtype=batch.dtype)[:, None]


@dataclass(frozen=True)
class Dice(Signal):
    """Draws from the global generator."""

    def value(self, batch):
        return torch.rand(batch.shape, dtype=batch.dtype)


@dataclass(frozen=True)
class Zero(TokenLoss):
    """Learns nothing."""

    def value(self, live):
        return live.logp * 0


@dataclass(frozen=True)
class RawLogit(TokenLoss):
    """Forgot the softmax."""

    def value(self, live):
        return -live.logits.gather(-1, live.tokens[:, None])[:, 0]


@dataclass(frozen=True)
class ChunkMean(TokenLoss):
    """Its own reduction: over whatever positions come in one chunk."""

    def value(self, live):
        return -live.logp - live.logp.mean() + live.logp.sum()


@dataclass(frozen=True)
class Unstable(TokenLoss):
    """Not finite."""

    def value(self, live):
        return (live.logp + live.read(LogpFact("teacher")).abs()) / 0


@dataclass(frozen=True)
class Product(RolloutLoss):
    """Multiplies where it should select."""

    def value(self, logp, mask, rows, batch):
        return (mask * (logp - batch.read(LogpFact("teacher"))[rows])).sum(1).square() + logp.shape[
            1
        ]


class Unhashable(Likelihood):
    """Compares by identity and pickles as nothing known."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Stray(Exception):
    """Raised by a broken part."""


@dataclass(frozen=True)
class Broken(Signal):
    """Fails at the second question."""

    def value(self, batch):
        if (
            (batch.tokens != 0).any()
            and ColumnFact("reward") in batch.facts
            and len(batch.tokens) == 6
            and batch.shape[1] == 10
        ):
            raise Stray("ten columns")
        return torch.ones(1, 1, dtype=batch.dtype)


@pytest.mark.parametrize(
    ("objective", "found"),
    [
        (Likelihood() * Unmasked(CREDIT), "padding does not change it"),
        (Likelihood() * ByRow(), "row order does not change it"),
        (Likelihood() * Dice(), "asked twice"),
        (Zero(), "some gradient reaches the student"),
        (RawLogit(), "a constant added to all logits"),
        (ChunkMean(), "chunks do not change it"),
        (ChunkMean(), "micro-batches do not change it"),
        (Unstable(), "loss and gradient are finite"),
        (Product().per("row_sums"), "padding does not change it"),
        (Unhashable(), "hashable, comparable"),
        (Likelihood() * Broken(), "Stray: ten columns"),
    ],
    ids=str,
)
def test_faults(objective, found):
    with pytest.raises(CheckFailed) as error:
        check(objective)
    assert any(found in line for line in str(error.value).splitlines() if "FAIL" in line), str(
        error.value
    )


def test_a_report_names_what_passed_and_what_is_read():
    report = check("opd")
    assert (
        len(report.passed) > 10
        and not report.failed
        and str(report).startswith("opd: PolicyGradient")
    )
    assert (
        report.notes[0] == "teacher == student: gradient norm 0"
        and "teacher log-prob" in report.notes[1]
    )
    lines = str(check(Divergence("forward_kl"))).splitlines()
    assert lines[0].startswith("own: Divergence") and sum("  pass  " in x for x in lines) == len(
        report.passed
    )


def test_fabricated_cases_have_what_the_objective_reads():
    objective = Objective(PolicyGradient(LogRatio("judge", "student")) * Mark("guided") * Reward())
    case = fabricate(objective, 1)
    assert (
        set(case.models) == {"judge"}
        and case.mask.sum(1).tolist() == [6, 4, 1, 6, 7, 3]
        and "guided" in case.marks
    )
    assert torch.equal(fabricate(objective, 1).student, case.student) and not torch.equal(
        fabricate(objective, 2).student, case.student
    )
    agree = fabricate(objective, 1, agree=True)
    assert torch.equal(agree.student, agree.models["judge"]) and torch.equal(
        agree.student, agree.before
    )
