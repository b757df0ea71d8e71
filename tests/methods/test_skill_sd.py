"""Skill-SD: the weighted k3 has value and gradient of the reverse KL whatever was drawn from, and
GRPO is left where it adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.methods.skill_sd import WeightedK3
from opdkit.objective import Estimator, LogpFact, TokenLoss, ratio
from opdkit.objective.maths import k3
from opdkit.testing import check, evaluate
from tests.methods.made_up import REWARD, advantages, assert_dense, clipped
from tests.methods.toy import P_S, P_T, close, logits, numbers, reverse_kl_gradient, tokens

P_OLD = (0.4, 0.4, 0.2)


@dataclass(frozen=True)
class Detached(TokenLoss):
    """The same with a weight that has no gradient."""

    def value(self, live):
        weight = ratio(live, "sampler").detach()
        return weight * k3(live.logp - live.read(LogpFact("teacher")))


def one(loss, y, drawn_from=P_OLD, teacher=P_T):
    return evaluate(
        loss,
        logits(P_S),
        tokens(y),
        models={"teacher": logits(teacher)},
        before_logits=logits(drawn_from),
    )


def expected(loss, drawn_from=P_OLD):
    """Value and gradient [V] averaged over what is drawn."""
    every = [one(loss, y, drawn_from) for y in range(3)]
    value = sum(p * out.loss for p, out in zip(drawn_from, every))
    return value, sum(p * out.grad[0, 0] for p, out in zip(drawn_from, every))


def test_values():
    l = (numbers(*P_S) / numbers(*P_T)).log()
    assert close(l, [0.916291, -0.510826, -0.405465])
    assert close(k3(l), [0.316291, 0.155841, 0.094535])
    assert close(numbers(*P_S) / numbers(*P_OLD), [1.25, 0.75, 1.0])
    values = torch.stack([one(WeightedK3(), y).loss for y in range(3)])
    assert close(values, [0.395363, 0.116881, 0.094535])


def test_the_gradient_is_the_log_ratio_times_that_of_the_log_prob():
    assert close(one(WeightedK3(), 0).grad[0, 0], [0.572682, -0.343609, -0.229073])


@pytest.mark.parametrize("drawn_from", [P_OLD, P_S, (0.1, 0.1, 0.8)])
def test_whatever_was_drawn_from_it_is_the_reverse_kl(drawn_from):
    value, gradient = expected(WeightedK3(), drawn_from)
    assert close(value, 0.223805) and close(gradient, [0.346243, -0.220389, -0.125854])
    assert close(gradient, reverse_kl_gradient(P_S, P_T), 12)


def test_with_a_weight_without_gradient_it_is_the_forward_kl():
    value, gradient = expected(Detached())
    assert close(value, 0.223805) and close(gradient, [0.3, -0.2, -0.1])
    _, naive = expected(Estimator("k3"), P_S)  # on policy, without a weight
    assert close(naive, numbers(*P_S) - numbers(*P_T), 12)


def test_without_a_skill_nothing_is_added():
    for y in range(3):
        out = one(WeightedK3(), y, P_OLD, teacher=P_S)
        assert out.loss == 0 and (out.grad == 0).all()


def test_without_a_weight_it_is_grpo_bit_for_bit():
    of_grpo, ours = load("grpo"), load("skill_sd", lam=0.0)
    assert ours.objective == of_grpo.objective and "teacher" not in ours.needs.models
    assert not ours.models and not ours.annotate
    facts = {"reward": REWARD[:2], "group": [0, 0]}
    z = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    a, b = (evaluate(m, z, ids, **facts) for m in (ours, of_grpo))
    assert torch.equal(a.grad, b.grad) and a.loss == b.loss


def test_equal_to_a_dense_reference():
    def formula(of):
        a = advantages(std=True)
        r = (of.at("student") - of.at("before")).exp()
        outer = (of.at("before") - of.at("sampler")).exp()
        apart = of.at("student") - of.at("teacher")
        kl = (of.at("student") - of.at("sampler")).exp() * ((-apart).exp() - 1 + apart)
        return of.per_row(outer * clipped(r, a, 0.2)) + 0.3 * of.per_token(kl)

    assert_dense(load("skill_sd", lam=0.3), formula, reward=True)


def test_the_teacher_is_the_student_that_reads_a_skill():
    made = load("skill_sd")
    assert made.models == {"teacher": {"kind": "self", "weights": "live", "view": "skill"}}
    assert made.annotate == {"skills": {"kind": "skills"}}
    with pytest.raises(UserError, match="lam=-1"):
        load("skill_sd", lam=-1.0)


@pytest.mark.parametrize("arguments", [{}, {"lam": 0.0}, {"lam": 0.1, "clip": None}])
def test_check(arguments):
    check(load("skill_sd", **arguments))
