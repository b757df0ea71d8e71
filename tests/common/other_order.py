"""A pytest plugin, `-p tests.common.other_order`: products, sums and means on the CPU add up in
another order, as unseen kernels would.

The terms of every sum are permuted, the same way for the same number of terms, so results differ by
rounding alone. It stands in for processors that are not at hand: a test that fails under it asks
for one order of adding up. Processes that a test starts keep theirs.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

OPS = torch.ops.aten
library = torch.library.Library("aten", "IMPL")


@cache
def order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def mm(a: Tensor, b: Tensor) -> Tensor:
    at = order(a.shape[1])
    return OPS.mm.out(a[:, at], b[at], out=a.new_empty(a.shape[0], b.shape[1]))


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    at = order(a.shape[1])
    return OPS.addmm.out(
        bias, a[:, at], b[at], beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1])
    )


def bmm(a: Tensor, b: Tensor) -> Tensor:
    at = order(a.shape[2])
    return OPS.bmm.out(a[:, :, at], b[:, at], out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def permuted(x: Tensor, dims: Any) -> Tensor:
    for dim in dims or range(x.dim()):
        x = x.index_select(dim, order(x.shape[dim])) if x.dim() else x
    return x


def total(x: Tensor, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    inexact = x.is_floating_point() or x.is_complex()
    dtype = dtype or (x.dtype if inexact else torch.int64)
    return OPS.sum.IntList_out(
        permuted(x, dims) if inexact else x,
        dims,
        keepdim,
        dtype=dtype,
        out=torch.empty(0, dtype=dtype),
    )


def mean(x: Tensor, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return OPS.mean.out(
        permuted(x, dims), dims, keepdim, dtype=dtype, out=torch.empty(0, dtype=dtype or x.dtype)
    )


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
    for name, function in (
        ("mm", mm),
        ("addmm", addmm),
        ("bmm", bmm),
        ("sum.dim_IntList", total),
        ("mean.dim", mean),
    ):
        library.impl(name, function, "CPU")
