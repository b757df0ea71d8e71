"""The arithmetic over whole vocabularies on this device, against float64."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import head
import head_types
import torch
from setting import Check, Figures, Setting, must
from torch import Tensor

from opdkit.objective import divergences
from opdkit.objective.divergences import (
    JSD,
    Alpha,
    ForwardKL,
    Hellinger2,
    ReverseKL,
    SkewForward,
    SkewReverse,
    TotalVariation,
)
from opdkit.objective.head import CHUNK_BYTES, chunk_rows
from opdkit.objective.kernels import Vocabulary, divergence, vocabulary
from opdkit.objective.kernels.listwise import listwise
from opdkit.objective.kernels.paired import by_rank, compare
from opdkit.objective.kernels.pairwise import distances, pulls

KINDS = (
    *(ReverseKL(), ForwardKL(), JSD(0.1), JSD(), JSD(0.9, normalised=True)),
    *(SkewForward(), SkewReverse(), Alpha(), Hellinger2(), TotalVariation()),
)
# relative to the norm: sums over V entries of float32, in another order than the truth's
NEAR = 2e-5
ROOM = 1.3  # of the memory that a pass may take by its own count


def _logits(setting: Setting, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student's and teacher's [rows, V], near each other as they are late in a run."""
    torch.manual_seed(setting.seed)
    z = 3 * torch.randn(rows, setting.vocabulary, device=setting.device)
    y = z + torch.randn_like(z)
    z[0, : setting.vocabulary // 3] = -math.inf  # ruled out
    y[1] = z[1]  # models that agree
    return z.to(dtype), y.to(dtype)


def _graded(way: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Values [n] and their gradient in z [n, V], rows weighted differently."""
    leaf = z.detach().clone().requires_grad_()
    value = way(leaf)
    weights = torch.linspace(0.5, 2, len(z), dtype=value.dtype, device=z.device)
    return value.detach(), torch.autograd.grad((weights * value).sum(), leaf)[0]


def _apart(
    name: str, ours: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor], z: Tensor
) -> float:
    """The larger of two relative errors, of values and of gradients, against float64."""
    mine, right = _graded(ours, z), _graded(truth, z.double())
    errors = [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(mine, right)
    ]
    worst = max(errors)
    must(math.isfinite(worst), f"{name}: not finite")
    return worst


def kernels(setting: Setting) -> Figures:
    """Every divergence over the whole vocabulary, in value and gradient."""
    rows = 6 if setting.small else 48
    used = vocabulary.fused(setting.device.split(":")[0]) is not None
    if setting.gpu and importlib.util.find_spec("triton") is not None:
        must(used, "Triton is installed, but its kernels do not run here")
    found: Figures = {"Triton": used}
    z, y = _logits(setting, rows, torch.float32)
    for kind in KINDS:

        def ours(x: Tensor, kind: Any = kind) -> Tensor:
            return divergence(kind, Vocabulary(x), Vocabulary(y))

        def truth(x: Tensor, kind: Any = kind) -> Tensor:
            return divergences.divergence(kind, x.log_softmax(-1), y.double().log_softmax(-1))

        found[repr(kind)] = _apart(repr(kind), ours, truth, z)
    own = divergence(ReverseKL(), Vocabulary(z), Vocabulary(z.clone()))
    must(bool((own == 0).all()), "reverse KL of a model to itself is not 0 to the bit")
    lse, entropy = vocabulary.statistics(z)
    logp = z.double().log_softmax(-1)
    right = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)
    found["entropy"] = float((entropy.double() - right).norm() / right.norm())
    found["normaliser"] = float((lse[:, 0] - z.double().logsumexp(-1)).abs().max())
    return _judged(found)


def _judged(found: Figures) -> Figures:
    far = {name: error for name, error in found.items() if type(error) is float and error > NEAR}
    must(not far, f"further than {NEAR:g} from float64: {far}")
    return found


def rankings(setting: Setting) -> Figures:
    """Whole rankings, comparisons by rank, and distances of all pairs."""
    rows = 4 if setting.small else 16
    z, y = _logits(setting, rows, torch.float32)
    z[0] = z[2]  # a ranking needs every entry

    def listed(x: Tensor) -> Tensor:
        order = y.sort(dim=-1, descending=True, stable=True).indices
        ls, lq = (t.log_softmax(-1).gather(-1, order) for t in (x, y.double()))
        left = ls.flip(-1).logcumsumexp(-1).flip(-1)
        return (lq.exp() * (left - ls)).sum(-1)

    def ranked(x: Tensor) -> Tensor:
        p, q = (t.softmax(-1).sort(-1, descending=True).values for t in (x, y.double()))
        return (p - q).abs().sum(-1)

    none = torch.zeros(rows, device=z.device)
    found = {
        "listwise": _apart("listwise", lambda x: listwise(x, y), listed, z),
        "by rank": _apart(
            "by rank",
            lambda x: compare(
                lambda p, q, at: by_rank(p, q), x, none.to(x.dtype), y, none, (1.0, 1.0)
            ),
            ranked,
            z,
        ),
    }
    p, q = z.softmax(-1), y.softmax(-1)
    exact = (p.double()[:, None] - q.double()[None]).abs().sum(-1)
    found["distances"] = float((distances(p, q) - exact).norm() / exact.norm())
    weight = torch.rand(rows, rows, device=z.device)
    signs = (p[:, None] - q[None]).sign().double()
    slope = (weight.double()[..., None] * signs).sum(1)
    found["pulls"] = float((pulls(p, q, weight) - slope).norm() / slope.norm())
    return _judged(found)


def memory(setting: Setting) -> Figures:
    """The peak of the chunked pass over the vocabulary: that of one chunk, however many
    positions.
    """
    dtype = getattr(torch, setting.dtype)
    v, n, h = (4096, 2048, 32) if setting.small else (151936, 32768, 1024)
    device = torch.device(setting.device)
    task = {"side": "opdkit", "v": v, "n": n, "h": h, "dtype": setting.dtype}
    setting.clean()
    extra = head.memory(task, setting.device)
    own = (n * h + v * h) * (dtype.itemsize + 4)  # gradients, and their float32 sums
    chunk = min(chunk_rows(v, device), n) * v * CHUNK_BYTES
    dense = head.DENSE_TENSORS * 4 * n * v
    must(
        extra <= ROOM * (own + chunk) or not setting.gpu,
        f"the pass took {extra / 2**30:.2f} GiB, a chunk with its gradients is "
        f"{(own + chunk) / 2**30:.2f} GiB",
    )
    return {"extra GiB": extra / 2**30, "dense GiB": dense / 2**30, "positions": n}


def number_types(setting: Setting) -> Figures:
    """Losses and gradients from bfloat16 hidden states and heads, against float64."""
    options = argparse.Namespace(
        vocab=2048 if setting.small else 151936,
        rows=64 if setting.small else 2048,
        checked=32 if setting.small else 64,
        hidden=64 if setting.small else 1024,
    )
    x = head_types.inputs(options.vocab, options.rows, options.hidden, 0.3, setting.device)
    checked = x.top(options.checked)
    truth = head_types.passed("float64", checked)
    found: Figures = {}
    for side in ("rounded", "bfloat16", "float32"):
        mine = head_types.passed(side, checked)
        for name, a, b in zip(("loss", "states", "head"), mine, truth):
            found[f"{side} {name}"] = float((a.double() - b).norm() / b.norm())
    must(
        found["bfloat16 loss"] < found["rounded loss"],
        f"the loss is no nearer to float64 than that of rounded logits: {found}",
    )
    # a gradient in bfloat16 is rounded to 8 bits, which alone is 1.6e-3
    must(max(found["bfloat16 states"], found["bfloat16 head"]) < 0.01, f"gradients: {found}")
    must(max(found[f"float32 {name}"] for name in ("loss", "states", "head")) < 1e-3, f"{found}")
    return found


CHECKS = (
    Check("kernels", "every divergence over the vocabulary against float64", 60, kernels),
    Check("rankings", "listwise, by rank and pairwise against float64", 40, rankings),
    Check("number types", "bfloat16 losses and gradients against float64", 40, number_types),
    Check("memory of the pass", "one chunk, however many positions", 40, memory),
)
