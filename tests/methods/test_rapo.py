"""RAPO: the estimate of the forward KL and its two gradients, the reference at a power, entropy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.methods.rapo import Covering, covering
from opdkit.objective import Const, Objective
from opdkit.testing import check, evaluate
from tests.methods.steps import GROUPS, advantages, agrees, at, ppo, step
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens

FORMS = ("autograd", "score")
FORWARD = 0.1937942  # KL(P_T || P_S)


def of(log_q, log_p, kl_grad):
    """The estimate and its slope in log p."""
    leaf = numbers(log_p).requires_grad_()
    value = covering(numbers(log_q), leaf, kl_grad)
    value.sum().backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize(
    ("phi", "f", "autograd", "score"),
    [(1.0, 0.0902040, 0.3032653, 0.3934693), (0.5, 0.0369809, -0.3210064, -0.2840254)],
)
def test_values(phi, f, autograd, score):
    """log pi_s = -1, log pi_ref = -1.5, at a power whose normaliser is left out."""
    w = numbers(phi * -1.5 + 1.0).exp()
    assert close(w, 0.6065307 if phi == 1 else 1.2840254, 7)
    for kl_grad, slope in (("autograd", autograd), ("score", score)):
        value, found = of(phi * -1.5, -1.0, kl_grad)
        assert close(value, f, 7) and close(found, slope, 7)


def test_the_estimate_is_never_negative_and_one_at_e():
    for kl_grad in FORMS:
        assert close(of(0.0, -1.0, kl_grad)[0], 1.0, 12)
        apart = torch.linspace(-12, 12, 2001).double()
        assert (covering(apart, torch.zeros_like(apart), kl_grad) >= 0).all()
        tiny = covering(numbers(1e-9, -1e-9), numbers(0, 0), kl_grad)
        assert (tiny >= 0).all() and tiny.max() < 1e-17


def test_far_away_one_gradient_vanishes_and_the_other_does_not():
    """w -> 0: nothing, or 1 of the score; large w: log w times as much, and bounded."""
    far = {form: of(-9.0, 0.0, form)[1].item() for form in FORMS}
    assert 0 < far["autograd"] < 2e-3 and 0.999 < far["score"] < 1
    near = {form: of(8.0, 0.0, form)[1].item() for form in FORMS}
    assert near["autograd"] / near["score"] == pytest.approx(8, rel=1e-3)
    for log_q in (-math.inf, -50.0):
        assert of(log_q, -1.0, "autograd")[1] == 0
        assert close(of(log_q, -1.0, "score")[1], 1 - math.exp(-10), 12)
    assert of(50.0, -1.0, "autograd")[1] == 0
    assert close(of(50.0, -1.0, "score")[1], 1 - math.exp(10), 6)


@pytest.mark.parametrize("kl_grad", FORMS)
def test_on_average_it_is_the_forward_kl(kl_grad):
    """And "score" has its gradient, p - q in the logits; the estimate's own is another."""
    loss, value, gradient = Objective(Covering(Const(1), kl_grad)), 0.0, 0.0
    for y, p in enumerate(P_S):
        out = evaluate(loss, logits(P_S), tokens(y), models={"reference": logits(P_T)})
        value, gradient = value + p * out.loss, gradient + p * out.grad[0, 0]
    assert close(value, FORWARD, 7)
    assert close(gradient, numbers(*P_S) - numbers(*P_T), 12) == (kl_grad == "score")


def tempered(phi, reference=P_T):
    """The reference at a power."""
    q = numbers(*reference) ** phi
    return q / q.sum()


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
def test_the_reference_is_normalised_at_its_power(phi):
    """E of the student: KL(q || pi_s), q uniform at 0."""
    q, p = tempered(phi), numbers(*P_S)
    total = sum(
        p[y]
        * evaluate(
            Objective(Covering(Const(phi), "score")),
            logits(P_S),
            tokens(y),
            models={"reference": logits(P_T)},
        ).loss
        for y in range(3)
    )
    assert close(total, (q * (q / p).log()).sum(), 12)
    assert phi != 0 or close(q, [1 / 3] * 3, 12)


@pytest.mark.parametrize("kl_grad", FORMS)
@pytest.mark.parametrize("phi", [0.0, 0.4, 1.0])
def test_a_student_at_the_tempered_reference_is_left_alone(kl_grad, phi):
    """To the bit at phi = 1, whatever the logits' size."""
    g = torch.Generator().manual_seed(0)
    ref = 3 * torch.randn(2, 4, 9, generator=g, dtype=torch.float64)
    ids = torch.randint(9, (2, 4), generator=g)
    out = evaluate(
        Objective(Covering(Const(phi), kl_grad)), phi * ref, ids, models={"reference": ref}
    )
    assert out.loss.abs() < 1e-30 and out.grad.abs().max() < 1e-15
    assert phi != 1 or (out.loss == 0 and (out.grad == 0).all())


def test_what_the_reference_rules_out_stays_out():
    """Two of four entries, one of them sampled: at power 0 q is uniform over the other two."""
    ref = torch.tensor([[[0.3, -math.inf, 1.1, -math.inf]]]).double()
    for phi in (0.0, 0.5, 1.0):
        q = (phi * ref[0, 0, [0, 2]]).softmax(-1)
        for y in range(4):
            out = evaluate(
                Objective(Covering(Const(phi), "score")), torch.zeros(1, 1, 4).double(), tokens(y),
                models={"reference": ref},
            )  # fmt: skip
            w = q[y // 2] * 4 if y in (0, 2) else numbers(-10).exp()[0]
            assert close(out.loss, w * w.log() - w + 1, 12) and out.grad.isfinite().all()


def test_failed_answers_have_the_flatter_reference():
    """phi of rewards 1, 0.4, 0, and of those beyond 0 .. 1."""
    case = step(0, fresh=True, models=("reference",))
    loss = load("rapo", phi_min=0.2).objective.terms[1].loss
    reward = torch.tensor([1.0, 0.4, 0.0, 3.0, -1.0, 0.9], dtype=torch.float64)
    case = replace(case, columns={"group": GROUPS, "reward": reward})
    found = loss.power(case.batch(load("rapo").objective))
    assert close(found[:, 0], [1.0, 0.52, 0.2, 1.0, 0.2, 0.92], 12)


def naive(case, alpha, beta, phi_min, kl_grad):
    """The card's formula over whole vocabularies."""

    def formula(now, models):
        logp, before, sampler = (
            at(x, case.tokens) for x in (now, models["before"], models["sampler"])
        )
        a = advantages(case.columns["reward"], GROUPS, std=True)[:, None]
        loss = (before - sampler).exp() * ppo((logp - before).exp(), a)
        phi = phi_min + (1 - phi_min) * case.columns["reward"]
        hat = (phi[:, None, None] * models["reference"]).log_softmax(-1)
        w = (at(hat, case.tokens) - logp).exp()
        if kl_grad == "autograd":
            kl = w * w.log() - w + 1
        else:
            kl = (w * w.log() - w + 1).detach() + (1 - w).detach() * (logp - logp.detach())
        loss = loss + alpha * kl + beta * (now.exp() * now).sum(-1)
        return (torch.where(case.mask, loss, 0.0).sum(1) / case.mask.sum(1)).mean()

    return formula


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("kl_grad", FORMS)
@pytest.mark.parametrize("more", [{}, {"alpha": 1.0, "beta": 0.5, "phi_min": 0.0}])
def test_equal_to_a_naive_reference(seed, fresh, kl_grad, more):
    case = step(seed, fresh, models=("reference",))
    values = {"alpha": 0.01, "beta": 0.001, "phi_min": 0.5, "kl_grad": kl_grad, **more}
    assert agrees(load("rapo", **values), case, naive(case, **values))


def test_without_weights_it_is_grpo():
    assert load("rapo", alpha=0.0, beta=0.0).objective == load("grpo").objective
    assert "reference" not in load("rapo", alpha=0.0).needs.models
    assert load("rapo").needs.whole("reference")


def test_with_a_power_of_one_the_reward_changes_no_penalty():
    case = step(0, fresh=True, models=("reference",))
    other = replace(case, columns={"group": GROUPS, "reward": 1 - case.columns["reward"]})
    loss = load("rapo", phi_min=1.0).objective.terms[1]
    a, b = (c.run(Objective(loss)) for c in (case, other))
    assert torch.equal(a.grad, b.grad)
    a, b = (c.run(Objective(load("rapo").objective.terms[1])) for c in (case, other))
    assert (a.grad - b.grad).abs().max() > 1e-5


def test_a_uniform_reference_at_power_zero_is_a_kind_of_entropy_bonus():
    """The expected gradient is p - 1/V: the most probable token is lowered."""
    loss = Objective(Covering(Const(0), "score"))
    mean = sum(
        p * evaluate(loss, logits(P_S), tokens(y), models={"reference": logits(P_T)}).grad[0, 0]
        for y, p in enumerate(P_S)
    )
    assert close(mean, numbers(*P_S) - 1 / 3, 12)


def test_bad_arguments_are_explained():
    for arguments, words in (
        ({"alpha": -0.1}, "alpha=-0.1 must be at least 0: it weighs"),
        ({"beta": math.nan}, "beta=nan"),
        ({"phi_min": 1.5}, r"phi_min=1.5 must lie in \[0, 1\]"),
        ({"kl_grad": "both"}, "kl_grad='both' must be one of autograd, score"),
    ):
        with pytest.raises(UserError, match=words):
            load("rapo", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kl_grad": "score"},
        {"alpha": 1.0, "phi_min": 0.0, "beta": 0.0},
        {"alpha": 0.0, "beta": 0.1},
        {"phi_min": 1.0, "kl_grad": "score", "clip": None},
    ],
)
def test_check(arguments):
    check(load("rapo", **arguments))
