"""The passes over whole vocabularies: equal to autograd through log-softmax in value and gradient,
in blocks and as Triton kernels.

Under TRITON_INTERPRET=1 the same cases run the Triton kernels on the CPU; one case starts that.
Where there is a GPU they run on it too.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from opdkit.objective import divergences, kernels
from opdkit.objective.divergences import (
    JSD,
    Alpha,
    ForwardKL,
    Hellinger2,
    Kind,
    ReverseKL,
    SkewForward,
    SkewReverse,
    TotalVariation,
)
from opdkit.objective.kernels import Vocabulary, vocabulary
from opdkit.objective.kernels.formula import formula
from opdkit.objective.losses import Divergence
from opdkit.testing import evaluate
from tests.common.rounding import rounding

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
MIXTURES = (
    *(ReverseKL(), ForwardKL(), JSD(0.0), JSD(0.1), JSD(), JSD(1.0), JSD(0.9, normalised=True)),
    *(SkewForward(), SkewReverse(), SkewForward(0.0), SkewReverse(0.0)),
)
OTHERS = (SkewForward(1.0), SkewReverse(1.0), Alpha(), Alpha(0.3), Hellinger2(), TotalVariation())
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
V = 37
INF = math.inf


@pytest.fixture(params=DEVICES, autouse=True)
def device(request, monkeypatch):
    """Blocks of two rows; tiles of 16 entries, so that the last one is not full."""
    monkeypatch.setattr(vocabulary, "BLOCK_ENTRIES", 2 * V + 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    if (used := vocabulary.fused(request.param)) is not None:
        monkeypatch.setattr(used, "TILE", 16)
    return request.param


def logits(dtype, device="cpu"):
    """Student and teacher [7, V]: plain, what the teacher, the student or both rule out, agreement,
    underflow, and a tile of nothing.
    """
    g = torch.Generator().manual_seed(0)
    z, y = (3 * torch.randn(7, V, generator=g, dtype=torch.float64) for _ in range(2))
    y[1, :30] = -INF
    z[2, 3:5] = -INF
    z[3, 20:], y[3, 20:] = -INF, -INF
    y[4] = z[4]
    z[5], y[5] = 60 * z[5], 60 * y[5]
    z[6, 16:32], y[6, 16:32] = -INF, -INF
    return z.to(device, dtype), y.to(device, dtype)


def plain(kind, z, y, temperature=1.0, cap=None):
    """Autograd through everything."""
    return divergences.divergence(
        kind, (z / temperature).log_softmax(-1), (y / temperature).log_softmax(-1), cap
    )


def ours(kind, z, y, temperature=1.0, cap=None):
    return kernels.divergence(kind, Vocabulary(z), Vocabulary(y), temperature, cap)


def with_gradient(way, kind, z, y, *arguments):
    """Values [n] and their gradients [n, V], rows weighted differently."""
    leaf = z.clone().requires_grad_()
    value = way(kind, leaf, y, *arguments)
    weights = torch.linspace(0.5, 2, len(z), dtype=z.dtype, device=z.device)
    return value.detach(), torch.autograd.grad((weights * value).sum(), leaf)[
        0
    ] if value.requires_grad else torch.zeros_like(z)


def agree(a, b, tolerance):
    return all(
        torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float64, 2.5), (torch.float32, 1.0)])
@pytest.mark.parametrize("kind", [*MIXTURES, *OTHERS], ids=repr)
def test_values_and_gradients_are_those_of_autograd(kind, dtype, temperature, device):
    """Up to the roundings of sums over V entries of a row: log-probs are twice as large as
    its logits, and rows weigh up to 2.
    """
    z, y = logits(dtype, device)
    out = with_gradient(ours, kind, z, y, temperature)
    assert all(x.isfinite().all() for x in out)
    value, gradient = with_gradient(plain, kind, z, y, temperature)
    size = 4 * torch.stack((z, y)).nan_to_num(neginf=0).abs().amax((0, -1))
    allowed = torch.tensor([rounding(dtype, float(s), V) for s in size], device=device)
    assert ((out[0] - value).abs() <= allowed).all() and (
        (out[1] - gradient).abs() <= allowed[:, None]
    ).all()
    assert (out[1][z == -INF] == 0).all()


@pytest.mark.parametrize(
    "kind", [ReverseKL(), ForwardKL(), JSD(0.3), SkewForward(), SkewReverse()], ids=repr
)
def test_gradcheck(kind, device):
    z, y = (x[:2, :5].contiguous() for x in logits(torch.float64, device))
    y[1] = torch.tensor([1.0, -INF, 0, 2, -1], dtype=y.dtype)
    assert torch.autograd.gradcheck(lambda x: ours(kind, x, y, 1.5), z.requires_grad_())


def test_every_divergence_to_a_mixture_has_a_formula_and_no_other():
    @dataclass(frozen=True)
    class Mine(ReverseKL):
        def entries(self, ls, lt):
            return 2 * super().entries(ls, lt)

    assert all(formula(kind) is not None for kind in MIXTURES)
    assert all(formula(kind) is None for kind in (*OTHERS, Mine()))
    z, y = logits(torch.float64)
    assert agree((ours(Mine(), z, y),), (2 * plain(ReverseKL(), z, y),), 1e-12)


def test_the_numbers_of_a_hand_worked_pair(device):
    """p = (.643914, .236883, .087144, .032059), q = (.187800, .510493, .113906, .187800)."""
    z = torch.tensor([[2.0, 1, 0, -1]], dtype=torch.float64, device=device)
    y = torch.tensor([[0.5, 1.5, 0, 0.5]], dtype=torch.float64, device=device)
    expected = {
        ReverseKL(): (0.531530, (0.451164, -0.307792, -0.069658, -0.073714)),
        ForwardKL(): (0.523059, (0.456114, -0.273611, -0.026762, -0.155741)),
    }
    for kind, (value, gradient) in expected.items():
        leaf = z.clone().requires_grad_()
        out = ours(kind, leaf, y)
        assert out.item() == pytest.approx(value, abs=1e-6)
        assert torch.autograd.grad(out.sum(), leaf)[0][0].tolist() == pytest.approx(
            gradient, abs=1e-6
        )


@pytest.mark.parametrize("kind", [ReverseKL(), JSD(0.3)], ids=repr)
def test_a_cap_bounds_each_entry(kind, device):
    z, y = logits(torch.float64, device)
    out = with_gradient(ours, kind, z, y, 1.0, 0.05)
    assert agree(out, with_gradient(plain, kind, z, y, 1.0, 0.05), 1e-12)
    assert (out[0] < ours(kind, z, y)).any()


@pytest.mark.parametrize(
    "kind", [ReverseKL(), ForwardKL(), JSD(), SkewForward(), TotalVariation()], ids=repr
)
def test_columns_of_padding_change_nothing(kind, device):
    z, y = logits(torch.float64, device)
    padded = [torch.nn.functional.pad(x, (0, 20), value=-INF) for x in (z, y)]
    value, gradient = with_gradient(ours, kind, *padded)
    assert agree((value, gradient[:, :V]), with_gradient(ours, kind, z, y), 1e-12)
    assert (gradient[:, V:] == 0).all()


def test_rows_far_apart_in_memory(device):
    """Logits that are a part of a wider matrix, or turned."""
    wide = torch.randn(6, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        device
    )
    for z, y in (
        (wide[:, :V], wide[:, 40 : 40 + V]),
        (wide.T[:40].contiguous().T, wide.T[40:].contiguous().T),
    ):
        assert agree(
            with_gradient(ours, JSD(0.2), z, y), with_gradient(plain, JSD(0.2), z, y), 1e-12
        )


@pytest.mark.parametrize("kind", [ReverseKL(), TotalVariation()], ids=repr)
def test_no_positions(kind, device):
    z = torch.zeros(0, V, device=device, requires_grad=True)
    value = ours(kind, z, z.detach())
    assert value.shape == (0,) and torch.autograd.grad(value.sum(), z)[0].shape == (0, V)
    normaliser, entropy = Vocabulary(z).statistics()
    assert normaliser.shape == (0, 1) and entropy.shape == (0,)


@pytest.mark.parametrize("kind", [ReverseKL(), JSD(), TotalVariation()], ids=repr)
def test_a_second_backward_gives_the_same(kind, device):
    z, y = logits(torch.float64, device)
    leaf = z.clone().requires_grad_()
    loss = (ours(kind, leaf, y) * 3).sum()
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert (first == second).all()


def test_what_is_not_a_number_stays_so(device):
    """It has to be found and reported, not lost in a maximum."""
    for place, dirty in ((0, 0), (20, 1), (V - 1, 0)):
        pair = logits(torch.float32, device)
        pair[dirty][0, place] = math.nan
        value, gradient = with_gradient(ours, ReverseKL(), *pair)
        assert value[0].isnan() and gradient[0].isnan().any() and value[1:].isfinite().all()
        assert all(x[0].isnan().all() for x in Vocabulary(pair[dirty]).statistics())


def test_vocabularies_of_different_size_are_refused():
    with pytest.raises(ValueError, match="compares the same ids on both sides"):
        ours(ReverseKL(), torch.zeros(2, 5), torch.zeros(2, 6))


# --------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_statistics(temperature, device):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        z, _ = logits(dtype, device)
        normaliser, entropy = Vocabulary(z).statistics(temperature)
        logp = (z.double() / temperature).log_softmax(-1)
        assert agree(
            (normaliser,),
            ((z.double() / temperature).logsumexp(-1, keepdim=True).to(dtype),),
            tolerance,
        )
        assert agree(
            (entropy,), (-(logp.exp() * logp.nan_to_num(neginf=0)).sum(-1).to(dtype),), tolerance
        )


def test_log_probs_at_ids_and_of_all(device):
    z, _ = logits(torch.float64, device)
    ids = torch.tensor([[5, 5, 0]], device=device).expand(len(z), -1)
    weights = torch.linspace(-1, 2, 3, dtype=z.dtype, device=device)
    leaf = z.clone().requires_grad_()
    for way, naive in (
        (
            lambda x: Vocabulary(x).at(ids) * weights,
            lambda x: x.log_softmax(-1).gather(-1, ids) * weights,
        ),
        (
            lambda x: Vocabulary(x).logps(2.0)[:, :3] * weights,
            lambda x: (x / 2).log_softmax(-1)[:, :3] * weights,
        ),
    ):
        pairs = [(out := f(leaf).clamp_min(-1e3)).detach() for f in (way, naive)]
        slopes = [torch.autograd.grad(f(leaf).clamp_min(-1e3).sum(), leaf)[0] for f in (way, naive)]
        assert out.requires_grad and agree((pairs[0], slopes[0]), (pairs[1], slopes[1]), 1e-12)


def test_models_that_agree_do_so_to_the_last_bit(device):
    """Value and gradient are 0, not noise: sharp rows, entries that underflow and ones that are
    ruled out too; also at some of the positions, which make other blocks.
    """
    z = torch.randn(7, V, generator=torch.Generator().manual_seed(2)).to(device)
    z[1], z[2, 3], z[3, 4:20] = 60 * z[1], 30.0, -INF
    leaf = z.clone().requires_grad_()
    own, other = Vocabulary(leaf), Vocabulary(z)
    for index in (torch.arange(7), torch.tensor([6, 2, 3])):
        part, same = own.select(index.to(device)), other.select(index.to(device))
        for kind in (*MIXTURES, *OTHERS):
            value = kernels.divergence(kind, part, same)
            assert (value == 0).all()
            if value.requires_grad:
                gradient = torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]
                assert (gradient == 0).all()
        assert (part.at(index[:, None].to(device)) == same.at(index[:, None].to(device))).all()


@pytest.mark.parametrize("kind", [ReverseKL(), ForwardKL(), JSD(0.3), TotalVariation()], ids=repr)
def test_an_objective_uses_them(kind):
    z, y = (x[:6].view(2, 3, V) for x in logits(torch.float64))
    out = evaluate(
        Divergence(kind, temperature=2.0),
        z,
        torch.zeros(2, 3, dtype=torch.int64),
        models={"teacher": y},
    )
    leaf = z.clone().requires_grad_()
    value = plain(kind, leaf.flatten(0, 1), y.flatten(0, 1), 2.0).mean()
    assert agree((out.loss, out.grad), (value.detach(), torch.autograd.grad(value, leaf)[0]), 1e-12)


# ------------------------------------------------------------------------------------------- Triton


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the case starts")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_triton_kernels_in_its_interpreter():
    """All of the above; a process of its own, as Triton decides when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", __file__]
    out = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout[-3000:]


@pytest.mark.skipif(not INTERPRETED, reason="of the run under TRITON_INTERPRET=1")
def test_the_kernels_run_here():
    assert vocabulary.fused("cpu") is not None


@pytest.fixture
def forget(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    vocabulary.fused.cache_clear()
    yield
    vocabulary.fused.cache_clear()


def test_without_triton(forget, monkeypatch, recwarn):
    # as where importing it fails
    monkeypatch.setitem(sys.modules, "opdkit.objective.kernels.fused", None)
    monkeypatch.delattr("opdkit.objective.kernels.fused", raising=False)
    assert vocabulary.fused("cpu") is None and len(recwarn) == 0
    z, y = logits(torch.float64)
    assert agree(with_gradient(ours, JSD(), z, y), with_gradient(plain, JSD(), z, y), 1e-12)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_triton_that_does_not_run(forget, monkeypatch):
    from opdkit.objective.kernels import fused

    def fails(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "statistics", fails)
    with pytest.warns(UserWarning, match=r"Failed to find C compiler"):
        assert vocabulary.fused("cpu") is None
    z, y = logits(torch.float64)
    assert agree((ours(JSD(), z, y),), (plain(JSD(), z, y),), 1e-12)


def test_the_cpu_does_not_use_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert vocabulary.fused.__wrapped__("cpu") is None


def test_a_kind_of_ones_own():
    """Any divergence runs block by block, by autograd."""

    @dataclass(frozen=True)
    class Squares(Kind):
        def entries(self, ls, lt):
            return (ls.exp() - lt.exp()).square()

    z, y = logits(torch.float64)
    assert agree(with_gradient(ours, Squares(), z, y), with_gradient(plain, Squares(), z, y), 1e-12)
