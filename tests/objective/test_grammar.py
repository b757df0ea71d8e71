"""The grammar: arithmetic of signals, terms and denominators, sums of terms, and that all of it is
a value that prints.
"""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass, field

import pytest
import torch

from opdkit.objective.batch import Batch
from opdkit.objective.facts import ColumnFact, LogpFact
from opdkit.objective.formula import Const, Signal, lift
from opdkit.objective.grammar import Objective, Term
from opdkit.objective.losses import Divergence, Likelihood, PolicyGradient
from opdkit.objective.signals import Correct, Exp, LogRatio, Mark, Reward
from opdkit.testing import evaluate
from tests.methods.toy import close, logits, numbers, tokens

A = LogRatio("a", "zero")
B = LogRatio("b", "zero")
VALUES = torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.5, -1.0]], dtype=torch.float64)
OTHER = torch.tensor([[2.0, 2.0, math.inf], [-1.0, 4.0, -1.0]], dtype=torch.float64)


def batch(**columns) -> Batch:
    facts = {
        LogpFact("a"): VALUES,
        LogpFact("b"): OTHER,
        LogpFact("zero"): torch.zeros_like(VALUES),
    }
    facts |= {ColumnFact(name.replace("_", ":")): value for name, value in columns.items()}
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return Batch(torch.zeros(2, 3, dtype=torch.int64), mask, facts, dtype=torch.float64)


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("signal", "value"),
    [
        (A + B, VALUES + OTHER),
        (A - 1, VALUES - 1),
        (1 - A, 1 - VALUES),
        (2 * A / 4, VALUES / 2),
        (1 / B, 1 / OTHER),
        (-A, -VALUES),
        (abs(A), VALUES.abs()),
        (A > 0, VALUES > 0),
        (A >= B, VALUES >= OTHER),
        (A < B, VALUES < OTHER),
        (A <= 0.5, VALUES <= 0.5),
        ((A > 0) & (B > 0), (VALUES > 0) & (OTHER > 0)),
        ((A > 0) | (B > 0), (VALUES > 0) | (OTHER > 0)),
        (~(A > 0), ~(VALUES > 0)),
        ((A > 0) * 3 + (A < 0), (VALUES > 0) * 3.0 + (VALUES < 0)),
        (3 + A * A, 3 + VALUES**2),
    ],
    ids=str,
)
def test_arithmetic(signal, value):
    assert torch.equal(signal(batch()), value)


def test_zero_times_infinity_is_zero():
    assert (A * B)(batch())[0].tolist() == [2, -4, 0] and (B * A)(batch())[0].tolist() == [2, -4, 0]


def test_rows_and_tokens_broadcast():
    columns = {"reward": numbers(2, 5), "correct": torch.tensor([True, False])}
    assert torch.equal((A * Reward())(batch(**columns)), VALUES * numbers(2, 5)[:, None])
    assert torch.equal((A * ~Correct())(batch(**columns)), VALUES * numbers(0, 1)[:, None])
    assert Const(3)(batch()).shape == (1, 1)


@dataclass(frozen=True)
class Counted(Signal):
    """Counts how often it is computed."""

    of: Signal
    calls: list = field(default_factory=list, compare=False)

    def value(self, batch):
        self.calls.append(1)
        return self.of(batch)


def test_a_signal_is_computed_once_per_step_however_often_it_is_written():
    calls: list = []
    here = batch()
    once = Counted(A, calls)
    (once + once * once)(here)
    Counted(LogRatio("a", "zero"), calls)(here)  # equal, written anew
    assert len(calls) == 1
    once(batch())
    assert len(calls) == 2  # another step


def test_only_signals_and_numbers_are_lifted():
    assert lift(2) == Const(2) and lift(A) is A
    for bad in ("teacher", None, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="neither a signal nor a number"):
            lift(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("signal", "text"),
    [
        (1 + 0.5 * (1 - A), "1 + 0.5 * (1 - log(a/zero))"),
        (A - (B - A), "log(a/zero) - (log(b/zero) - log(a/zero))"),
        (A - B - A, "log(a/zero) - log(b/zero) - log(a/zero)"),
        (A / (B * A), "log(a/zero) / (log(b/zero) * log(a/zero))"),
        (-(A + B), "-(log(a/zero) + log(b/zero))"),
        (~((A > 0) & (B > 1)), "~((log(a/zero) > 0) & (log(b/zero) > 1))"),
        (abs(A - B) * 2, "|log(a/zero) - log(b/zero)| * 2"),
        (Exp(A) * ~Mark("guided"), "exp(log(a/zero)) * ~Mark(guided)"),
    ],
)
def test_a_signal_prints_as_it_is_written(signal, text):
    assert str(signal) == text


def test_signals_are_values():
    a, b = (1 + 0.5 * Exp(LogRatio("a", "zero")) * ~Mark("guided") for _ in range(2))
    assert (
        a == b
        and hash(a) == hash(b)
        and pickle.loads(pickle.dumps(a)) == a
        and copy.deepcopy(a) == a
    )
    assert len({a, b, 1 + 0.5 * Exp(B) * ~Mark("guided")}) == 2


# -------------------------------------------------------------------------------- terms, objectives


@pytest.mark.parametrize(
    ("over", "count"),
    [("tokens", 5.0), ("own", 3.0), ("rows", [[6.0], [4.0]]), ("row_sums", 2.0), (10, 20.0)],
)
def test_denominators(over, count):
    here = batch()
    term = (Likelihood() * (A > 0)).per(over)  # trained and positive: three
    plan = Objective(term).plan(here)
    assert torch.equal(plan.parts[0].denominator, torch.tensor(count, dtype=torch.float64))
    assert plan.parts[0].weight.tolist() == [[1, 0, 0], [1, 1, 0]]


def test_a_plan_is_for_the_rows_of_one_optimiser_step():
    plan = (Likelihood() * (A > 0)).per("own") + Likelihood().per("rows")
    step = plan.plan(batch(), torch.tensor([0]))
    assert [p.denominator.flatten().tolist() for p in step.parts] == [[1], [3, 1]]
    assert step.selected.tolist() == [[True] * 3, [False] * 3]


def test_nothing_selected_is_one_not_zero_in_the_denominator():
    for over in ("tokens", "own", "rows", "row_sums", 7):
        here = batch()
        here.trained = torch.zeros_like(here.trained)
        part = Objective(Likelihood().per(over)).plan(here).parts[0]
        assert (part.denominator >= 1).all() and (part.scale == 0).all()


@pytest.mark.parametrize("bad", ["token", "sequence", 0, -3, 1.5])
def test_an_unknown_denominator_is_refused(bad):
    with pytest.raises(ValueError, match="limit or a positive length"):
        Likelihood().per(bad)


def test_weights_multiply_and_denominators_stay():
    term = (Likelihood() * 2 * A).per("rows") * B
    assert (
        term == Term(Likelihood(), lift(2) * A * B, "rows") and 2 * Likelihood() == Likelihood() * 2
    )
    assert Term(Likelihood()) * A == Likelihood() * A  # a weight of one is no factor


def test_sums_are_flat_and_ordered():
    a, b, c = Likelihood() * 2, PolicyGradient(LogRatio("teacher", "student")), Divergence("jsd")
    for objective in (
        a + b + c,
        a + (b + c),
        Objective(a, b, c),
        Objective(a, Objective(b, c)),
        (a + b) + Objective(c),
    ):
        assert objective == Objective(a, Term(b), Term(c))
    assert (a + b) * 3 == Objective(a * 3, b * 3)
    with pytest.raises(TypeError, match="sum of losses and terms"):
        a + LogRatio("a", "b")  # type: ignore[operator]


def test_names_are_unique():
    pg = PolicyGradient(LogRatio("teacher", "student"))
    objective = pg + Likelihood() + pg * 2 + Divergence("forward_kl")
    assert objective.names == ("policy_gradient_1", "likelihood", "policy_gradient_2", "forward_kl")


def test_an_objective_prints_as_its_formula():
    pg = PolicyGradient(LogRatio("teacher", "student"))
    text = str(pg * ~Mark("guided") + (Likelihood() * Mark("guided") * 0.001).per("own"))
    assert (
        text
        == "PolicyGradient(log(teacher/student)) * ~Mark(guided)\n  + Likelihood() * Mark(guided) "
        "* 0.001 per own"
    )


def test_the_loss_is_the_sum_of_its_terms():
    s, t = (
        logits((0.5, 0.3, 0.2), (0.1, 0.2, 0.7)),
        {"teacher": logits((0.2, 0.5, 0.3), (0.3, 0.3, 0.4))},
    )
    parts = [
        Divergence("jsd") * 2,
        (Likelihood() * (LogRatio("teacher", "student") > 0)).per("own"),
        Likelihood().per("row_sums"),
    ]
    whole, alone = (
        evaluate(Objective(*parts), s, tokens(1, 2), models=t),
        [evaluate(p, s, tokens(1, 2), models=t) for p in parts],
    )
    assert close(whole.loss, sum(x.loss for x in alone).item(), 12) and close(
        whole.grad, sum(x.grad for x in alone), 12
    )
    assert [x.value.item() for x in whole.terms] == pytest.approx([x.loss.item() for x in alone])
