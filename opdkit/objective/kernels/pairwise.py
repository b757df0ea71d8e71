"""L1 distances between all of some distributions and all of others, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE, GPU_TILE = 64, 256  # rows, and columns, of a tile at most
ENTRIES, GPU_ENTRIES = 1 << 20, 1 << 26  # differences that are held at once


def distances(p: Tensor, q: Tensor) -> Tensor:
    """[n, m]: sum_v |p_v - q_v| of every row of p [n, V] and every row of q [m, V]; no gradient."""
    out = p.new_zeros(len(p), len(q))
    for rows, columns, at in tiles(p, q):
        out[rows, columns] += apart(p[rows, at], q[columns, at]).abs_().sum(-1)
    return out


def pulls(p: Tensor, q: Tensor, weight: Tensor) -> Tensor:
    """[n, V]: sum_j weight_ij sign(p_i - q_j), the slope of sum_j weight_ij |p_i - q_j| in p; for
    p [n, V], q [m, V], weight [n, m].
    """
    out = torch.zeros_like(p)
    for rows, columns, at in tiles(p, q):
        signs = apart(p[rows, at], q[columns, at]).sign_()
        out[rows, at] += torch.bmm(weight[rows, None, columns], signs)[:, 0]
    return out


def apart(p: Tensor, q: Tensor) -> Tensor:
    """[r, c, w]: p_i - q_j for p [r, w] and q [c, w]."""
    return p[:, None] - q[None]


def tiles(p: Tensor, q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of p [n, V], rows of q [m, V] and entries, of which all differences are small enough to
    be held.
    """
    side, entries = (TILE, ENTRIES) if p.device.type == "cpu" else (GPU_TILE, GPU_ENTRIES)
    width = max(1, entries // (min(side, len(p) or 1) * min(side, len(q) or 1)))
    for i in range(0, len(p), side):
        for j in range(0, len(q), side):
            for v in range(0, p.shape[-1], width):
                yield slice(i, i + side), slice(j, j + side), slice(v, v + width)
