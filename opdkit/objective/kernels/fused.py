"""The passes over [n, V] logits as Triton kernels: one program per row and tile of the vocabulary,
their sums added in PyTorch.

Logits are float32 or float64, as a head makes them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opdkit.objective.kernels.formula import Formula
from opdkit.objective.maths import LOGP_FLOOR

TILE = 2048  # entries of one program


@triton.jit
def _statistics(z, z_row, V, lse, entropy, T: tl.constexpr, TILE: tl.constexpr):
    """Log sum exp of a tile of one row, and the entropy of the tile's softmax."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * TILE + tl.arange(0, TILE)
    x = tl.load(z + row * z_row + at, mask=at < V, other=float("-inf")) / T
    top = tl.max(x, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(x - top)
    total = tl.sum(weight, 0)
    inner = tl.sum(weight * tl.where(weight > 0, x - top, 0.0), 0)
    cell = row * tl.num_programs(1) + part
    tl.store(lse + cell, top + tl.log(total))
    tl.store(entropy + cell, tl.where(total > 0, tl.log(total) - inner / total, 0.0))


@triton.jit
def _entries(
    z, z_row, y, y_row, lz, ly, row, at, V,
    T: tl.constexpr, A: tl.constexpr, TW: tl.constexpr, SW: tl.constexpr, K: tl.constexpr,
    FLOOR: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """Student probability, value and slope less k p of each entry of a tile: see `formula`."""
    x = tl.load(z + row * z_row + at, mask=at < V, other=float("-inf"))
    w = tl.load(y + row * y_row + at, mask=at < V, other=float("-inf"))
    ls = tl.where(x == float("-inf"), FLOOR, x / T - tl.load(lz + row))
    lt = tl.where(w == float("-inf"), FLOOR, w / T - tl.load(ly + row))
    p = tl.where(x == float("-inf"), 0.0, tl.exp(ls))
    q = tl.where(w == float("-inf"), 0.0, tl.exp(lt))
    if A == 0:
        value, slope = q * (lt - ls), p - q
    elif A == 1:
        value = p * (ls - lt)
        slope = value
    else:
        gap = lt - ls
        larger = tl.maximum(p, q)
        apart = (tl.minimum(p, q) - larger) / tl.maximum(larger, TINY)
        log_share = tl.log(1 + tl.where(gap > 0, (1 - A) * apart, A * apart))
        slope = -SW * p * (log_share + tl.maximum(gap, 0.0))
        value = slope - TW * q * (log_share + tl.maximum(-gap, 0.0))
        if K != 0:
            mix = tl.maximum(p + A * (q - p), TINY)
            slope += K * (1 - A) * (p * (q - p) / mix)
    # beyond the vocabulary value is 0: both rule the entry out
    return p, value, tl.where(x == float("-inf"), 0.0, slope)


@triton.jit
def _values(
    z, z_row, y, y_row, lz, ly, V, values, totals,
    T: tl.constexpr, A: tl.constexpr, TW: tl.constexpr, SW: tl.constexpr, K: tl.constexpr,
    FLOOR: tl.constexpr, TINY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums of value and slope over a tile of one row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * TILE + tl.arange(0, TILE)
    _, value, slope = _entries(z, z_row, y, y_row, lz, ly, row, at, V, T, A, TW, SW, K, FLOOR, TINY)
    cell = row * tl.num_programs(1) + part
    tl.store(values + cell, tl.sum(value, 0))
    tl.store(totals + cell, tl.sum(slope, 0))


@triton.jit
def _gradients(
    z, z_row, y, y_row, lz, ly, V, totals, grad, out,
    T: tl.constexpr, A: tl.constexpr, TW: tl.constexpr, SW: tl.constexpr, K: tl.constexpr,
    FLOOR: tl.constexpr, TINY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to a tile of one row of the student's logits."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * TILE + tl.arange(0, TILE)
    p, _, slope = _entries(z, z_row, y, y_row, lz, ly, row, at, V, T, A, TW, SW, K, FLOOR, TINY)
    gradient = (slope - p * tl.load(totals + row)) * (tl.load(grad + row) / T)
    tl.store(out + row * V + at, gradient, mask=at < V)


# ----------------------------------------------------------------------------------------- launches


def statistics(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Normaliser [n, 1] and entropy [n] of logits [n, V] over `temperature`."""
    logits = _rows(logits)
    lse, inner = _partial(logits), _partial(logits)
    _launch(
        _statistics, logits, logits, logits.stride(0), logits.shape[1], lse, inner, T=temperature
    )
    normaliser = lse.logsumexp(-1, keepdim=True)
    share = (lse - normaliser).exp()
    # of the tile, and within it
    return normaliser, (share * inner + torch.special.entr(share)).sum(-1)


def values(
    form: Formula, z: Tensor, y: Tensor, lz: Tensor, ly: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Divergences [n] of logits z, y [n, V] with normalisers lz, ly [n, 1], and the sums of their
    slopes [n].
    """
    z, y = _rows(z), _rows(y)
    parts, totals = _partial(z), _partial(z)
    _launch(
        _values,
        z,
        z,
        z.stride(0),
        y,
        y.stride(0),
        lz,
        ly,
        z.shape[1],
        parts,
        totals,
        **_settings(form, z, temperature),
    )
    return parts.sum(-1), totals.sum(-1)


def gradients(
    form: Formula,
    z: Tensor,
    y: Tensor,
    lz: Tensor,
    ly: Tensor,
    temperature: float,
    totals: Tensor,
    grad: Tensor,
) -> Tensor:
    """[n, V]: gradient with respect to z, given that of the divergences [n] and the sums of their
    slopes [n].
    """
    z, y = _rows(z), _rows(y)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    arguments = (z, z.stride(0), y, y.stride(0), lz, ly, z.shape[1], totals, grad.contiguous(), out)
    _launch(_gradients, z, *arguments, **_settings(form, z, temperature))
    return out


def _settings(form: Formula, z: Tensor, temperature: float) -> dict[str, float]:
    """What a kernel is told of a divergence, for logits [n, V]."""
    tiny = torch.finfo(z.dtype).tiny
    return {
        "T": temperature,
        "A": form.a,
        "TW": form.t,
        "SW": form.s,
        "K": form.k,
        "FLOOR": LOGP_FLOOR,
        "TINY": tiny,
    }


def _rows(x: Tensor) -> Tensor:
    """[n, V] with the entries of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _partial(x: Tensor) -> Tensor:
    """[n, tiles]: one number per program."""
    return torch.empty(len(x), triton.cdiv(x.shape[1], TILE), dtype=x.dtype, device=x.device)


def _launch(kernel: Any, x: Tensor, *arguments: Any, **settings: float) -> None:
    """One program per row and tile of x [n, V]."""
    if len(x) > 0:
        with torch.cuda.device_of(x):
            kernel[len(x), triton.cdiv(x.shape[1], TILE)](
                *arguments, **settings, TILE=TILE, num_warps=8
            )
