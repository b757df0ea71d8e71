"""ERPD: signals, the trust region around what was drawn from, and the penalty to the base."""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
from tests.methods.made_up import assert_dense, clipped
from tests.methods.ragged import on, slopes
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens

EXTREME, BASE, UNLEARNED = ([-0.4, -1.5, -0.9],), ([-0.7, -1.0, -0.9],), ([-1.2, -0.6, -0.9],)
NOW = ([-0.55, -1.2, -0.9],)
PLAIN = {"clip": 0.2, "b": 0.0}


def credit(method, **models):
    return on(method, BASE, models=models).terms[0].credit[0]


def test_signals():
    models = {"teacher": EXTREME, "reference": BASE}
    assert close(credit(load("erpd", **PLAIN), **models), [0.3, -0.5, 0.0])
    weak = load("erpd", signal="weak", **PLAIN)
    assert close(credit(weak, teacher=EXTREME, unlearned=UNLEARNED), [0.8, -0.9, 0.0])
    assert close(credit(weak, teacher=BASE, unlearned=UNLEARNED), [0.5, -0.4, 0.0])
    assert weak.needs.models - {"student", "sampler"} == {"teacher", "unlearned"}
    capped = load("erpd", cap=0.4, **PLAIN)
    assert close(credit(capped, **models), [0.3, -0.4, 0.0])


def test_the_trust_region_lies_around_what_was_drawn_from():
    """Ratios (1.161834, 0.818731, 1) to the base, none beyond 0.8 .. 1.2."""
    models = {"teacher": EXTREME, "reference": BASE}
    out = on(load("erpd", **PLAIN), NOW, before=BASE, models=models)
    assert close(out.loss, 0.020272)
    each = torch.tensor([-0.348550, 0.409365, 0.0]).double()
    assert close(slopes(out, NOW), each / 3)  # d (w S) = w S d log pi_s
    # the student before the step is another than what was drawn from: the region does not move
    moved = on(load("erpd", **PLAIN), NOW, before=NOW, sampler=BASE, models=models)
    assert close(moved.loss, out.loss, 12) and close(moved.grad, out.grad, 12)
    narrow = on(load("erpd", clip=0.1, b=0.0), NOW, before=BASE, models=models)
    assert close(slopes(narrow, NOW), [0.0, 0.0, 0.0])  # both ran past their side of 0.9 .. 1.1


def test_an_extreme_policy_that_is_the_base_teaches_nothing():
    out = on(load("erpd"), BASE, models={"teacher": BASE, "reference": BASE})
    assert out.loss == 0 and (out.grad == 0).all()


def test_the_signal_does_not_depend_on_the_student():
    models = {"teacher": EXTREME, "reference": BASE}
    before, after = (on(load("erpd"), s, models=models).terms[0].credit for s in (BASE, NOW))
    assert torch.equal(before, after)


def test_one_update_of_fresh_rollouts_has_a_ratio_of_one():
    models = {"teacher": EXTREME, "reference": BASE}
    out = on(load("erpd", **PLAIN), NOW, models=models)
    assert close(slopes(out, NOW), [-0.3 / 3, 0.5 / 3, 0.0])


def test_a_large_penalty_holds_the_student_at_the_base():
    """Away from the base it costs b times as much, at the base nothing, however large b is."""
    z = {"teacher": logits(P_T), "reference": logits(P_S)}
    away = logits((0.6, 0.25, 0.15))

    def pull(b):
        """[]: the expected penalty of a student that has left the base."""
        return sum(
            p * evaluate(load("erpd", b=b), away, tokens(y), models=z).terms[1].value
            for y, p in enumerate(away.exp()[0, 0])
        )

    assert pull(100.0) > 1000 * pull(0.05) > 0
    at_base = [evaluate(load("erpd", b=1e6), logits(P_S), tokens(y), models=z) for y in range(3)]
    assert all(out.terms[1].value == 0 for out in at_base)


def test_at_a_weight_of_one_the_optimum_is_the_extreme_policy():
    """E[-S + k3] under the student is KL(student || extreme) - 0: least, and 0, where they
    agree.
    """
    base, z = numbers(*P_S), {"teacher": logits(P_T), "reference": logits(P_S)}

    def value(p):
        return sum(
            q * evaluate(load("erpd", b=1.0), logits(tuple(p)), tokens(y), models=z).loss
            for y, q in enumerate(p)
        )

    g = torch.Generator().manual_seed(0)
    assert close(value(numbers(*P_T)), 0.0, 12)
    for _ in range(10):
        p = torch.rand(3, generator=g, dtype=torch.float64).add(0.05)
        p = p / p.sum()
        assert close(value(p), (p * (p / numbers(*P_T)).log()).sum(), 9) and value(p) > 0
    assert value(base) > 0


@pytest.mark.parametrize("estimator", ["k3+", "k2"])
def test_with_the_gradient_of_that_kl_training_ends_there(estimator):
    """At the extreme policy the expected gradient is zero, and elsewhere it is not."""
    z = {"teacher": logits(P_T), "reference": logits(P_S)}
    method = load("erpd", b=1.0, estimator=estimator)

    def gradient(p):
        return sum(
            q * evaluate(method, logits(p), tokens(y), models=z).grad[0, 0] for y, q in enumerate(p)
        )

    assert close(gradient(P_T), [0.0, 0.0, 0.0], 12)
    assert gradient((0.4, 0.4, 0.2)).abs().max() > 0.01


@pytest.mark.parametrize("signal", ["strong", "weak"])
def test_equal_to_a_dense_reference(signal):
    against = "reference" if signal == "strong" else "unlearned"

    def formula(of):
        s = (of.at("teacher") - of.at(against)).clamp(-0.8, 0.8)
        w = (of.at("student") - of.at("sampler")).exp()
        d = of.at("reference") - of.at("student")
        return of.per_token(clipped(w, s, 0.1) + 0.05 * (d.exp() - d - 1))

    names = ("teacher", "reference", "unlearned")
    assert_dense(load("erpd", cap=0.8, signal=signal), formula, names)


def test_bad_arguments_are_explained():
    for arguments, message in (({"signal": "x"}, "strong"), ({"cap": 0.0}, "cap=0")):
        with pytest.raises(UserError, match=message):
            load("erpd", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"signal": "weak", "b": 0.0, "cap": None}, {"dual_clip": 3.0, "rollout_cap": 2.0}],
)
def test_check(arguments):
    check(load("erpd", **arguments))
