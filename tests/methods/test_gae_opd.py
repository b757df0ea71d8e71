"""GAE-OPD: its estimator on given numbers, and its limits vOPD and discounted OPD."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.gae_opd import GAE
from opdkit.methods.method import load
from opdkit.objective import Batch, Signal
from opdkit.testing import check, evaluate
from tests.methods.toy import P_S, P_T, close, logits, reverse_kl_gradient, tokens

R, V = (-0.2, 0.1, -0.4), (-0.5, -0.3, -0.4)


@dataclass(frozen=True)
class Given(Signal):
    numbers: tuple[float, ...]

    def value(self, batch):
        return torch.tensor([self.numbers], dtype=batch.dtype)


def gae(r, v, discount, lam, mask=None):
    mask = torch.tensor([mask or [True] * len(r)])
    return GAE(Given(r), Given(v), discount, lam)(
        Batch(torch.zeros_like(mask, dtype=torch.int64), mask, dtype=torch.float64)
    )[0]


def test_without_a_value_it_is_the_discounted_return():
    assert close(gae(R, (0.0,) * 3, 1.0, 1.0), [-0.5, -0.3, -0.4])
    assert close(gae(R, (0.0,) * 3, 0.5, 1.0), [-0.25, -0.1, -0.4])


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_undiscounted_horizon_zero_is_r_less_v(lam):
    assert close(gae(R, V, 0.0, lam), [0.3, 0.4, 0.0])


def test_between():
    assert close(gae(R, V, 0.9, 0.5), [0.048, 0.04, 0.0])


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_an_exact_value_leaves_nothing(lam):
    assert close(gae(R, V, 1.0, lam), [0.0, 0.0, 0.0], 12)


def test_a_tools_tokens_take_no_time():
    """The same numbers with an untrained token in between, whose score is infinite."""
    held = gae(
        (-0.2, float("inf"), 0.1, -0.4),
        (-0.5, float("nan"), -0.3, -0.4),
        0.9,
        0.5,
        [True, False, True, True],
    )
    assert close(held, [0.048, 0.0, 0.04, 0.0])


TEACHER = {"teacher": logits(P_T, (0.3, 0.3, 0.4), P_S)}
STUDENT = logits(P_S, P_T, (0.1, 0.2, 0.7))


@pytest.mark.parametrize("lam", [0.0, 0.95])
def test_discount_zero_is_vopd(lam):
    ours = evaluate(
        load("gae_opd", discount=0.0, lam=lam), STUDENT, tokens(0, 2, 1), models=TEACHER
    )
    vopd = evaluate("vopd", STUDENT, tokens(0, 2, 1), models=TEACHER)
    assert close(ours.grad, vopd.grad, 12) and close(ours.loss, vopd.loss.item(), 12)


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_no_value_and_lam_one_is_opd_with_a_discount(discount):
    ours = evaluate(
        load("gae_opd", discount=discount, lam=1.0, value="zero"),
        STUDENT,
        tokens(0, 2, 1),
        models=TEACHER,
    )
    opd = evaluate(load("opd", discount=discount), STUDENT, tokens(0, 2, 1), models=TEACHER)
    assert close(ours.grad, opd.grad, 12)


@pytest.mark.parametrize("arguments", [{}, {"value": "zero"}, {"discount": 0.0}])
def test_one_token_has_the_gradient_of_the_reverse_kl(arguments):
    """The value of the last token is a baseline: whatever it is, the mean gradient stays."""
    method = load("gae_opd", **arguments)
    facts = {"models": {"teacher": logits(P_T)}}
    mean = sum(
        p * evaluate(method, logits(P_S), tokens(y), **facts).grad[0, 0] for y, p in enumerate(P_S)
    )
    assert close(mean, reverse_kl_gradient(P_S, P_T), 12) and close(
        mean, [0.346243, -0.220389, -0.125854]
    )


@pytest.mark.parametrize(
    "arguments",
    [{}, {"value": "zero"}, {"discount": 0.0}, {"clip": (0.2, 0.2), "rollout_cap": 2.0}],
)
def test_check(arguments):
    check(load("gae_opd", **arguments))


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="'kl' or 'zero'"):
        load("gae_opd", value="critic")
