"""Faults of estimators that other systems shipped (PITFALLS E1 to E8, and R5): named by their
number.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from opdkit.methods.grpo import grpo
from opdkit.methods.method import load, methods
from opdkit.objective.facts import LogpFact
from opdkit.objective.formula import Signal
from opdkit.objective.grammar import Objective, Term, TokenLoss
from opdkit.objective.losses import Divergence, Estimator, PolicyGradient
from opdkit.objective.signals import Advantage, Entropy, Exp, Gap, LogRatio, MeanOne
from opdkit.testing import evaluate, fabricate
from tests.common.toy import FORWARD_GRAD, REVERSE, REVERSE_GRAD, Z_S, Z_T, P, Q
from tests.methods.toy import close, expected, numbers, reverse_kl_gradient

CREDIT = LogRatio("teacher", "student")
K3 = Exp(CREDIT) - CREDIT - 1  # exp(-d) + d - 1 with d = log pi_s - log pi_t


def test_the_shared_numbers():
    s, t = numbers(*Z_S).log_softmax(0), numbers(*Z_T).log_softmax(0)
    assert close(s.exp(), (0.643914, 0.236883, 0.087144, 0.032059)) and close(
        t.exp(), (0.187800, 0.510493, 0.113906, 0.187800)
    )
    assert close((s.exp() * (s - t)).sum(), REVERSE) and close((t.exp() * (t - s)).sum(), 0.523059)
    assert close(reverse_kl_gradient(P, Q), REVERSE_GRAD) and close(s.exp() - t.exp(), FORWARD_GRAD)


@dataclass(frozen=True)
class K1(TokenLoss):
    """log pi_s - log pi_t, backpropagated: not offered."""

    def value(self, live):
        return live.logp - live.read(LogpFact("teacher"))


def test_E1_k1_backpropagated_is_blind_to_the_teacher_and_refused():
    with pytest.raises(ValueError, match="teacher drops out"):
        Estimator("k1")
    assert close(expected(K1(), P, Q), (0, 0, 0, 0), 12) and close(
        expected(K1(), P, P[::-1]), (0, 0, 0, 0), 12
    )
    assert close(expected(Estimator("k1+"), P, Q), REVERSE_GRAD)


def test_E2_k2_has_the_gradient_of_reverse_kl_and_k3_of_forward_kl():
    assert close(expected(Estimator("k2"), P, Q), REVERSE_GRAD)
    assert close(expected(Estimator("k3"), P, Q), FORWARD_GRAD)
    assert close(expected(Estimator("k3+"), P, Q), REVERSE_GRAD)


def test_E3_minus_k1_as_credit_is_reverse_kl_and_minus_k3_neither_direction():
    assert close(expected(PolicyGradient(CREDIT), P, Q), REVERSE_GRAD)
    assert close(expected(PolicyGradient(-K3), P, Q), (-0.004951, -0.034181, -0.042896, 0.082028))


def test_E3_no_method_credits_a_token_with_an_estimator_other_than_k1():
    """An estimator is a loss, a credit is a signal: there is no switch that turns k3 into
    a credit.
    """
    assert not isinstance(Estimator("k3"), Signal)
    with pytest.raises(TypeError, match="neither a signal nor a number"):
        CREDIT + Estimator("k3")  # type: ignore[operator]
    for name in methods():
        for term in load(name).objective.terms:
            assert str(K3) not in str(getattr(term.loss, "credit", ""))


SAMPLE_BLIND = [
    Gap(),
    Gap("forward_kl"),
    Gap("reverse_kl", "student", 2),
    Gap("jsd", "union", 2),
    Entropy("student"),
    Gap() * 2 + 1,
]


@pytest.mark.parametrize("credit", SAMPLE_BLIND, ids=str)
def test_E4_a_credit_that_is_the_same_for_every_token_is_refused(credit):
    with pytest.raises(ValueError, match="does not depend on the sampled token"):
        PolicyGradient(credit)


@dataclass(frozen=True)
class Hidden(Signal):
    """A gap that claims to depend on the token."""

    of: Signal
    odd: Signal = CREDIT

    def value(self, batch):
        return self.of(batch)


@pytest.mark.parametrize("blind", SAMPLE_BLIND, ids=str)
def test_E4_its_expected_gradient_is_zero_and_as_a_baseline_it_changes_nothing(blind):
    assert close(expected(PolicyGradient(Hidden(blind)), P, Q), (0, 0, 0, 0), 12)
    assert close(expected(PolicyGradient(CREDIT + blind), P, Q), REVERSE_GRAD)


def test_E5_a_credit_never_carries_a_gradient():
    student = torch.tensor([[Z_S]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[Z_T]], dtype=torch.float64)
    ids = torch.tensor([[0]])
    out = evaluate(load("opd"), student, ids, models={"teacher": teacher})
    s, t = student.log_softmax(-1)[0, 0, 0], teacher.log_softmax(-1)[0, 0, 0]
    (right,) = torch.autograd.grad(-(t - s).detach() * s, student, retain_graph=True)
    (wrong,) = torch.autograd.grad(-(t - s) * s, student)
    assert torch.allclose(out.grad, right, rtol=0, atol=1e-12) and not torch.allclose(
        out.grad, wrong, atol=0.1
    )


def test_E5_facts_come_without_a_gradient():
    objective = load("tropd").objective
    batch = fabricate(objective).batch(objective)
    plan = objective.plan(batch)
    tensors = [*batch.facts.values(), *batch.signals.values(), *(part.scale for part in plan.parts)]
    assert len(tensors) > 10 and not any(x.requires_grad for x in tensors)


def test_E6_discount_zero_is_the_per_token_objective_and_one_sums_what_follows():
    case = fabricate(load("opd").objective)
    assert load("opd", discount=0.0).objective == load("opd").objective
    token, whole = (
        case.run(load("opd").objective).terms[0],
        case.run(load("opd", discount=1.0).objective).terms[0],
    )
    r = torch.where(case.mask, token.credit, 0.0)
    naive = torch.stack([torch.where(case.mask[:, t], r[:, t:].sum(1), 0.0) for t in range(7)], 1)
    assert torch.allclose(whole.credit, naive, rtol=0, atol=1e-12)


def test_E7_the_teachers_credit_is_not_standardised():
    """A credit ten times as large has ten times the gradient; a whitened one would forget it."""
    case = fabricate(load("opd").objective)
    once, ten = (case.run(Objective(PolicyGradient(c))) for c in (CREDIT, 10 * CREDIT))
    assert torch.allclose(ten.grad, 10 * once.grad, rtol=1e-12)
    mixed = case.run(grpo() + PolicyGradient(CREDIT))
    # nor when a reward stands beside it
    assert torch.equal(mixed.terms[1].credit, once.terms[0].credit)


@pytest.mark.parametrize("reward", [[1.0] * 6, [0.0] * 6])
def test_E8_no_variance_of_the_reward_leaves_the_teacher(reward):
    case = fabricate(grpo() + PolicyGradient(CREDIT))
    flat = type(case)(**{**vars(case), "columns": case.columns | {"reward": reward}})
    out, alone = flat.run(grpo() + PolicyGradient(CREDIT)), flat.run(load("opd").objective)
    assert out.terms[0].value == 0 and torch.equal(out.grad, alone.grad) and alone.grad.norm() > 0


@pytest.mark.parametrize(
    "name", ["opd", "gkd", "exopd", "tropd", "iw_opd", "position_opd", "scope", "vopd"]
)
@pytest.mark.parametrize("correct", [True, False])
def test_E8_a_prompt_with_one_rollout_of_one_token_still_learns(name, correct):
    student, teacher, reference = (
        torch.tensor([[z]], dtype=torch.float64) for z in (Z_S, Z_T, Z_T[::-1])
    )
    models = {"teacher": teacher, "reference": reference}
    out = evaluate(
        load(name), student, torch.tensor([[1]]), models=models, correct=[correct], group=[0]
    )
    assert out.grad.isfinite().all() and out.grad.norm() > 0.05


def test_R5_an_agreeing_teacher_is_zero_for_every_estimator_and_weighting():
    student = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(1))
    weights = [
        1,
        0.5,
        Exp(Entropy("student")),
        MeanOne(Entropy("teacher")),
        Advantage("mean"),
        abs(CREDIT) + 1,
    ]
    losses = [PolicyGradient(CREDIT), *(Estimator(k) for k in ("k2", "k3", "k1+", "k3+"))]
    losses += [Divergence(k, k=n) for k in ("reverse_kl", "forward_kl", "jsd") for n in (None, 6)]
    for loss in losses:
        for weight in weights:
            for over in ("tokens", "own", "rows", "row_sums", 7):
                term = (Term(loss) * weight).per(over)
                out = evaluate(
                    term,
                    student,
                    ids,
                    models={"teacher": student},
                    reward=[1.0, 0.0, 0.5],
                    group=[0, 0, 0],
                )
                assert abs(out.loss) < 1e-12 and out.grad.abs().max() < 1e-12, str(term)
