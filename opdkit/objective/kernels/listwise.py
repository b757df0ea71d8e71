"""A ranking of whole vocabularies and how probable it is to another model, as one choice after the
other (Plackett and Luce).

Value and gradient are taken block by block in closed form: a chunk keeps one [n, V] gradient and no
sorted copy. With r the ranking, q the weights and c_k = log sum_{l >= k} exp z_r(l),

    value = sum_k q_r(k) (c_k - z_r(k))
    d value / d z_r(j) = exp(z_r(j)) sum_{k <= j} q_r(k) exp(-c_k) - q_r(j)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opdkit.objective.kernels.vocabulary import blocks
from opdkit.objective.maths import finite

GPU_ENTRIES = 1 << 24  # of one block on a GPU: a sort takes many times the memory of what it sorts


def listwise(z: Tensor, y: Tensor, first: Tensor | None = None, tail: bool = False) -> Tensor:
    """[n]: -log of each choice in the ranking by decreasing y under softmax(z), times softmax(y)
    of what is chosen, for logits z, y [n, K]; gradient to z.

    Of equals the lower id comes first. `first` [n]: ids that come before all others. `tail`: the
    last entry stands for many and comes last.
    """
    return _Listwise.apply(z, y.detach(), first, tail)


class _Listwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, first: Tensor | None, tail: bool) -> Tensor:
        values, gradient = z.new_empty(len(z)), torch.empty_like(z)
        for at in blocks(z, GPU_ENTRIES):
            rank = y[at].clone()
            if tail:
                rank[:, -1] = -torch.inf
            if first is not None:
                rank.scatter_(1, first[at, None], torch.inf)
            order = descending_ids(rank)
            ls, lq = (finite(x[at].log_softmax(-1)).gather(-1, order) for x in (z, y))
            values[at], slope = choices(ls, lq)
            gradient[at] = torch.empty_like(slope).scatter_(-1, order, slope)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None, None, None


def choices(ls: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """[r] and slope [r, K] of log-probs `ls` and log-weights `lq` [r, K], in the order of the
    ranking.
    """
    left = ls.flip(-1).logcumsumexp(-1).flip(-1)
    q = lq.exp()
    slope = (lq - left).logcumsumexp(-1).add_(ls).exp_().sub_(q)
    return (q * (left - ls)).sum(-1), slope


def descending_ids(x: Tensor) -> Tensor:
    """[r, K]: the ids of x [r, K] from the largest, of equals the lower first.

    On a CPU numpy sorts, as in `paired`: numbers and ids as one integer.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.sort(dim=-1, descending=True, stable=True).indices
    import numpy as np

    bits = (x + 0.0).numpy().view(np.int32)  # -0 is 0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # as integers they rank as the numbers do
    keys = (~bits).astype(np.int64)
    keys <<= 32
    keys |= np.arange(x.shape[-1], dtype=np.int64)
    keys.sort(-1)
    return torch.from_numpy(keys & 0xFFFFFFFF)
