"""f-distill: weights of the density ratio, and the same numbers for tokens."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.neighbours.f_distill import (
    WEIGHTS,
    Settings,
    density_ratio,
    enough,
    levelled,
    matching_loss,
    weights,
)
from opdkit.objective.divergences import JSD, Chi2, ForwardKL, Hellinger2, Kind, ReverseKL

F64 = torch.float64
RATIOS = torch.tensor([0.1, 0.5, 1, 2, 20], dtype=F64)

# D = E_own[f(r)] as torch writes it
FUNCTIONS = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),  # twice the usual one
    "softened_reverse_kl": lambda r: (1 + 1 / r).log() * (1 + r) - math.log(2) * (1 + r),
    "hellinger2": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 1 / r - 1,
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_each_weight_is_the_second_derivative_of_its_divergence(kind: str) -> None:
    """h = r^2 f''(r)."""
    r = RATIOS.clone().requires_grad_()
    (first,) = torch.autograd.grad(FUNCTIONS[kind](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    assert torch.allclose(WEIGHTS[kind](RATIOS), RATIOS**2 * second, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("forward_kl", [0.021186, 0.105932, 0.211864, 0.423729, 4.237288]),
        ("js", [0.178723, 0.655319, 0.982979, 1.310638, 1.872340]),
        ("softened_reverse_kl", [1.850220, 1.356828, 1.017621, 0.678414, 0.096916]),
        ("reverse_kl", [1.0] * 5),
    ],
)
def test_normalised_weights(kind: str, values: list[float]) -> None:
    got = weights(kind, RATIOS)
    assert got.tolist() == pytest.approx(values, abs=1e-6) and got.mean().item() == pytest.approx(1)


def test_a_factor_of_the_divergence_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights("js", RATIOS)
    monkeypatch.setitem(WEIGHTS, "js", lambda r: 7 * r / (1 + r))
    assert torch.allclose(weights("js", RATIOS), before)
    monkeypatch.setitem(WEIGHTS, "js", lambda r: r / (2 + r))
    assert not torch.allclose(weights("js", RATIOS), before)


def test_ratios_are_kept_in_bounds() -> None:
    logit = torch.tensor([-1000.0, -3.0, 0.0, 1.0, 3.0, 1000.0])
    assert density_ratio(logit).tolist() == pytest.approx([0.1, 0.1, 1, math.e, 20, 20])


def test_ratios_over_the_mean_of_their_level() -> None:
    """Levels 0.1 and 0.3 share the first of two bins: mean 2, with half kept of 1: 1.5."""
    r, s = torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.3])
    got, usual = levelled(r, s, torch.ones(2), 0.5)
    assert usual.tolist() == [1.5, 1.0] and got.tolist() == pytest.approx([1 / 1.5, 2])
    assert levelled(r, s, usual, 0.0)[1].tolist() == [2.0, 1.0]
    assert levelled(r, s, usual, 1.0)[1].tolist() == usual.tolist()


def test_reverse_kl_is_plain_score_matching() -> None:
    """The gradient is less the scores' difference over n D, times a weight that is 1."""
    draw = torch.Generator().manual_seed(0)
    x, toward = (torch.randn(5, 3, generator=draw, dtype=F64) for _ in range(2))
    x.requires_grad_()
    matching_loss(x, toward, weights("reverse_kl", RATIOS)).backward()
    assert torch.allclose(x.grad, -toward / 15)
    x.grad = None
    matching_loss(x, toward, weights("js", RATIOS)).backward()
    assert torch.allclose(x.grad, -weights("js", RATIOS)[:, None] * toward / 15)


def test_the_weighted_scores_are_the_divergences_gradient() -> None:
    """Own points N(m, 1), teacher N(0, 1): d D_f / dm = -E[h(r) (score_t - score_own)], by sums
    over a fine grid.
    """
    x = torch.linspace(-12, 12, 20001, dtype=F64)
    for kind, f in FUNCTIONS.items():
        m = torch.tensor(0.7, dtype=F64, requires_grad=True)
        own = (-((x - m) ** 2) / 2).exp()
        own = own / own.sum()
        theirs = (-(x**2) / 2).exp() / (-(x**2) / 2).exp().sum()
        (slope,) = torch.autograd.grad((own * f(theirs / own)).sum(), m)
        with torch.no_grad():
            expected = -(own * WEIGHTS[kind](theirs / own) * (-x - (m - x))).sum()
        assert slope.item() == pytest.approx(expected.item(), rel=1e-5), kind


@pytest.mark.parametrize(
    ("kind", "factor", "gradient"),
    [
        (ReverseKL(), 1, [-0.188139, -0.101516, 0.289656]),
        (ForwardKL(), 1, [-0.168894, -0.078053, 0.246947]),
        (JSD(0.5), 2, [-0.086257, -0.043351, 0.129607]),
        (Hellinger2(), 1, [-0.043864, -0.022052, 0.065916]),
    ],
)
def test_the_numbers_for_tokens(kind: Kind, factor: float, gradient: list[float]) -> None:
    """E_own[c grad log pi], c = f - r f' = the kind's slope at log(p_s / p_t), up to a constant;
    any constant, such as the mean of c, leaves it.
    """
    teacher = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    logits = torch.tensor([0.1, -0.3, 0.4], dtype=F64, requires_grad=True)
    logp = logits.log_softmax(-1)
    c = factor * kind.slope((logp - teacher.log()).detach())
    p = logp.exp().detach()
    for credit in (c, c - (p * c).sum(), c + 5):
        (got,) = torch.autograd.grad((p * credit * logp).sum(), logits, retain_graph=True)
        assert got.tolist() == pytest.approx(gradient, abs=1e-6)
    whole = factor * kind.entries(logp, teacher.log()).sum()
    (got,) = torch.autograd.grad(whole, logits)
    assert got.tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "kind", "factor"),
    [
        ("reverse_kl", ReverseKL(), 1),
        ("forward_kl", ForwardKL(), 1),
        ("js", JSD(0.5), 2),
        ("hellinger2", Hellinger2(), 1),
        ("neyman", Chi2(), 1),
    ],
)
def test_a_tokens_credit_falls_with_the_weight(name: str, kind: Kind, factor: float) -> None:
    """dc / dlog r = -h(r), so that opdkit's kinds and these weights are the same divergences."""
    log_r = RATIOS.log()
    step = 1e-5
    c = [factor * kind.slope(-(log_r + d)) for d in (step, -step)]
    assert torch.allclose((c[0] - c[1]) / (2 * step), -WEIGHTS[name](RATIOS), rtol=1e-6)


def test_equal_densities_teach_nothing() -> None:
    logp = torch.tensor([0.2, -0.4, 0.9], dtype=F64).log_softmax(-1)
    for kind in (ReverseKL(), ForwardKL(), JSD(0.5), Hellinger2()):
        c = kind.slope(torch.zeros_like(logp))
        assert torch.allclose(c - (logp.exp() * c).sum(), torch.zeros(3, dtype=F64), atol=1e-15)
    assert all((weights(kind, torch.ones(4)) == 1).all() for kind in WEIGHTS)


def test_modes_that_get_a_fifth_of_their_share_count() -> None:
    """Of 100 samples and four modes a share is 25, a fifth of it 5."""
    which = torch.tensor([0] * 5 + [1] * 4 + [3] * 60)
    assert enough(which, 4, 100) == 2


@pytest.mark.neighbours
def test_both_tasks_run_small() -> None:
    from opdkit.base.progress import progress
    from opdkit.neighbours.f_distill import run

    settings = Settings(seeds=1, rounds=20, inner=1, batch=64, ema=0.5)
    outcome = run(settings, progress)
    assert [row["task"] for row in outcome.table] == ["ring"] * 3 + ["digits"] * 3
    assert all(0 <= y <= 10 for p in outcome.panels for ys in p.lines.values() for y in ys[0])
