"""The losses at one position: policy gradient and its clipped form, likelihood, estimators,
divergences on a support.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from opdkit.objective import divergences, maths
from opdkit.objective.divergences import JSD, Alpha, Kind, SkewForward, SkewReverse
from opdkit.objective.kernels import divergence_on_support
from opdkit.objective.kernels.formula import formula
from opdkit.objective.losses import (
    Clipped,
    Divergence,
    Estimator,
    Likelihood,
    PolicyGradient,
    RatioWeighted,
)
from opdkit.objective.signals import Gap, Logp, LogRatio
from opdkit.objective.support import Support
from opdkit.testing import evaluate
from tests.methods.ragged import on
from tests.methods.toy import (
    P_S,
    P_T,
    close,
    logits,
    numbers,
    tokens,
)

CREDIT = LogRatio("teacher", "student")
S, T = logits(P_S), {"teacher": logits(P_T)}


def test_policy_gradient_on_a_stale_rollout():
    """Ratio to the sampler, credit from the student before the step, gradient through neither."""
    out = on(
        PolicyGradient(CREDIT),
        [[-1.0]],
        before=[[-1.2]],
        sampler=[[-1.5]],
        models={"teacher": [[-0.7]]},
    )
    ratio = numbers(0.5).exp().item()
    assert close(out.loss, -ratio * 0.5, 12)
    p = numbers(-1.0).exp().item()
    assert close(out.grad[0, 0], (-ratio * 0.5 * (1 - p), ratio * 0.5 * (1 - p)), 12)


@pytest.mark.parametrize("base", ["student", "sampler", "reference", Logp("reference")])
def test_the_ratio_may_be_to_any_model(base):
    by = {
        "before": [[-1.2]],
        "sampler": [[-1.5]],
        "models": {"teacher": [[-0.7]], "reference": [[-0.4]]},
    }
    below = {"student": -1.2, "sampler": -1.5}.get(base, -0.4) if isinstance(base, str) else -0.4
    assert close(
        on(PolicyGradient(CREDIT, base), [[-1.0]], **by).loss,
        -numbers(-1.0 - below).exp().item() * 0.5,
        12,
    )


def test_to_the_live_student_the_ratio_is_one():
    """REINFORCE: value -credit and slope -credit, whoever wrote the token and however far the
    student has moved since.
    """
    by = {"before": [[-1.2]], "sampler": [[-1.5]], "models": {"teacher": [[-0.7]]}}
    out = on(PolicyGradient(CREDIT, base="live"), [[-1.0]], **by)
    p = numbers(-1.0).exp().item()
    assert close(out.loss, -0.5, 12)
    assert close(out.grad[0, 0], (-0.5 * (1 - p), 0.5 * (1 - p)), 12)


@pytest.mark.parametrize(
    ("base", "most", "weight"),
    [("sampler", math.inf, 0.5), ("sampler", 1.2, None), ("student", 9.0, 0.2)],
)
@pytest.mark.parametrize("loss", [Likelihood(), Estimator("k2"), PolicyGradient(CREDIT, "live")])
def test_a_ratio_as_weight_has_no_gradient(loss, base, most, weight):
    """It is that of the student as it is now, -1.0, to -1.5 or -1.2: e^0.5, 1.2 at most, or
    e^0.2 times the loss and its gradient.
    """
    by = {"before": [[-1.2]], "sampler": [[-1.5]], "models": {"teacher": [[-0.7]]}}
    weighted, plain = RatioWeighted(loss, base, most), on(loss, [[-1.0]], **by)
    out, times = on(weighted, [[-1.0]], **by), most if weight is None else math.exp(weight)
    assert close(out.loss, times * plain.loss.item(), 12) and close(
        out.grad, times * plain.grad, 12
    )
    assert (weighted.name, weighted.credit) == (loss.name, getattr(loss, "credit", None))


@pytest.mark.parametrize("low", [0.1, 0.3])
@pytest.mark.parametrize("high", [0.2, 0.5])
@pytest.mark.parametrize("dual", [None, 2.0])
def test_clipped_is_ppos_formula(low, high, dual):
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        live, base, teacher = (-2 * torch.rand(3, generator=g, dtype=torch.float64) - 0.1).tolist()
        rho, a = numbers(live - base).exp(), teacher - base
        loss = -torch.minimum(rho * a, rho.clamp(1 - low, 1 + high) * a)
        if dual is not None and a < 0:
            loss = torch.minimum(loss, numbers(-dual * a))
        out = on(
            Clipped(CREDIT, low, high, dual),
            [[live]],
            before=[[base]],
            models={"teacher": [[teacher]]},
        )
        assert close(out.loss, loss.item(), 12)


def test_likelihood():
    out = evaluate(Likelihood(), S, tokens(1))
    assert close(out.loss, -numbers(0.3).log().item(), 12) and close(
        out.grad[0, 0], (0.5, -0.7, 0.2), 12
    )


@pytest.mark.parametrize("kind", ["k2", "k3", "k1+", "k3+"])
def test_estimators_read_the_live_student(kind):
    d = numbers(-1.0 + 0.6)
    value = {"k2": 0.5 * d**2, "k1+": d}.get(kind, (-d).exp() + d - 1)
    slope = (1 - (-d).exp()) if kind == "k3" else d
    out = on(Estimator(kind), [[-1.0]], before=[[-3.0]], models={"teacher": [[-0.6]]})
    assert close(out.loss, value.item(), 12) and close(
        out.grad[0, 0, 0] / (1 - numbers(-1.0).exp()), slope, 12
    )


def test_estimator_against_another_model():
    by = {"models": {"teacher": [[-0.6]], "reference": [[-2.0]]}}
    assert close(on(Estimator("k2", "reference"), [[-1.0]], **by).loss, 0.5, 12)
    with pytest.raises(ValueError, match="k2, k3, k1"):
        Estimator("k4")


# -------------------------------------------------------------------------------------- divergences


def test_the_cap_bounds_what_each_entry_adds():
    entries = numbers(*P_S) * (numbers(*P_S) / numbers(*P_T)).log()
    out = evaluate(Divergence("reverse_kl", cap=0.1), S, tokens(0), models=T)
    assert close(out.loss, entries.clamp(max=0.1).sum().item(), 12) and entries.max() > 0.1
    top = evaluate(Divergence("reverse_kl", k=1, cap=0.1), S, tokens(0), models=T)
    assert close(top.loss, 0.1, 12) and (top.grad == 0).all()  # what is capped does not pull


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_temperature_on_a_renormalised_support(t):
    out = evaluate(
        Divergence("reverse_kl", k=2, support="student", rest="renormalise", temperature=t),
        S,
        tokens(0),
        models=T,
    )
    a, b = (numbers(*x[:2]) ** (1 / t) for x in (P_S, P_T))
    a, b = a / a.sum(), b / b.sum()
    assert close(out.loss, (a * (a / b).log()).sum().item(), 12)


@pytest.mark.parametrize("rest", ["raw", "target", "tail"])
def test_temperature_needs_a_normaliser(rest):
    with pytest.raises(ValueError, match="renormalise"):
        Divergence("reverse_kl", k=2, rest=rest, temperature=2.0)


@pytest.mark.parametrize("t", [0.0, -1.0])
def test_temperature_is_positive(t):
    with pytest.raises(ValueError, match="positive"):
        Divergence("jsd", temperature=t)


def test_another_teacher():
    models = {"teacher": S, "second": logits(P_T)}
    assert close(
        evaluate(Divergence("reverse_kl", teacher="second"), S, tokens(0), models=models).loss,
        0.223805,
    )
    ours = evaluate(
        Divergence("reverse_kl", k=2, teacher="second"), S, tokens(0), models=models
    ).loss
    assert close(
        ours, evaluate(Divergence("reverse_kl", k=2), S, tokens(0), models=T).loss.item(), 12
    )


def test_names_in_the_log():
    names = [
        Divergence(k).name for k in ("forward_kl", JSD(), JSD(0.1), Alpha(0.3), SkewReverse(0.2))
    ]
    assert names == ["forward_kl", "jsd", "jsd", "alpha", "skewreverse"]
    assert str(Divergence("forward_kl", 64)) == "Divergence(kind=forward_kl, k=64, support=teacher)"


def test_gap_and_divergence_agree():
    for kind in ("reverse_kl", "forward_kl", "jsd", "tv", "hellinger2", "chi2"):
        for support, k, rest in (
            ("full", None, "raw"),
            ("teacher", 2, "tail"),
            ("student", 2, "renormalise"),
            ("union", 1, "target"),
        ):
            loss = evaluate(Divergence(kind, k, support, rest), S, tokens(0), models=T).loss
            gap = (
                evaluate(Likelihood() * Gap(kind, support, k, rest), S, tokens(0), models=T)
                .terms[0]
                .weight
            )
            assert close(gap, [[loss.item()]], 12)


def test_the_divergence_follows_the_live_student_and_the_gap_does_not():
    now = logits((0.1, 0.2, 0.7))
    out = evaluate(
        Divergence("reverse_kl") + Likelihood() * Gap(), now, tokens(0), models=T, before_logits=S
    )
    p, q = numbers(0.1, 0.2, 0.7), numbers(*P_T)
    assert close(out.terms[0].value, (p * (p / q).log()).sum().item(), 12) and close(
        out.terms[1].weight, [[0.223805]]
    )


def test_a_user_can_bring_a_divergence():
    @dataclass(frozen=True)
    class Squares(Kind):
        def entries(self, ls, lt):
            return (ls.exp() - lt.exp()).square()

    out = evaluate(Divergence(Squares()), S, tokens(0), models=T)
    d = numbers(*P_S) - numbers(*P_T)
    assert close(out.loss, d.square().sum().item(), 12)
    p = numbers(*P_S)
    assert close(out.grad[0, 0], 2 * p * (d - (p * d).sum()), 12)


# -------------------------------------------------------------------------------- models that agree


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [None, 0.01])
@pytest.mark.parametrize(
    ("support", "rest"),
    [("full", "raw")]
    + [
        (support, rest)
        for support in ("teacher", "student", "union", "intersection")
        for rest in ("raw", "renormalise", "tail")
    ],
)
def test_models_that_agree_have_no_loss_and_no_gradient(support, rest, cap, dtype):
    """To the bit, on sharp rows and with entries that are ruled out.

    On a part of the vocabulary that is not made to sum to one, the KL divergences and their skewed
    forms pull (see `topk_opd`) or push p_s(v), times their k, whatever the teacher says: there the
    value alone is 0.
    """
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(2, 5, 60, generator=g)
    z[0, 0, 5], z[0, 1], z[1, 1, 7:40] = 30.0, 20 * z[0, 1], -torch.inf
    z, at = z.to(dtype), torch.randint(5, (2, 5), generator=g)
    for kind in (
        *divergences.KINDS.values(),
        JSD(0.1),
        JSD(0.3, normalised=True),
        SkewForward(0.5),
    ):
        for temperature in (1.0, 2.0) if rest == "renormalise" or support == "full" else (1.0,):
            k = None if support == "full" else 4
            loss = Divergence(kind, k, support, rest, cap, temperature)
            out = evaluate(loss, z, at, models={"teacher": z})
            assert out.loss == 0, kind
            lopsided = (form := formula(kind)) is not None and form.k != 0
            if rest == "raw" and support != "full" and lopsided:
                assert (out.grad != 0).any()
            else:
                assert (out.grad == 0).all(), kind


@pytest.mark.parametrize("rest", ["raw", "renormalise", "target", "tail"])
@pytest.mark.parametrize("cap", [None, 0.02])
def test_a_divergence_on_a_support_is_its_definition(rest, cap):
    """Value and gradient are those of autograd through `divergences.divergence`, the definition."""
    g = torch.Generator().manual_seed(1)
    z, y = (2 * torch.randn(3, 9, generator=g, dtype=torch.float64) for _ in range(2))
    z[1, 2], y[2, 4] = -torch.inf, -torch.inf
    leaf, where = z.clone().requires_grad_(), Support("teacher", 9, rest)
    ls, lt = maths.restrict(leaf.log_softmax(-1)[:, :6], y.log_softmax(-1)[:, :6], rest)
    for kind in (
        *divergences.KINDS.values(),
        JSD(0.1),
        JSD(0.3, normalised=True),
        SkewForward(0.5),
    ):
        ours = divergence_on_support(kind, ls, lt, cap, where.whole)
        plain = divergences.divergence(kind, ls, lt, cap)
        slopes = [
            torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0].nan_to_num()
            for x in (ours, plain)
        ]
        assert torch.allclose(ours, plain, atol=1e-12), kind
        assert torch.allclose(*slopes, atol=1e-12), kind
