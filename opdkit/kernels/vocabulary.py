"""One model's logits at a chunk of positions, and what losses read off them, in passes that keep nothing of size [n, V].

A pass goes block by block, so that on a CPU its intermediate results stay in the cache. On a GPU the same sums are Triton kernels
(`fused`), where Triton runs and the divergence has a formula; else a pass is one block.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from opdkit import maths
from opdkit.kernels.formula import Formula, formula
from opdkit.maths import Kind

BLOCK_ENTRIES = 1 << 17  # of one block on one CPU core: 512 KiB in float32
LOWEST = -1e4  # stands for -inf below the highest logit of a row: its exponential is zero, and zero times it is zero


class Vocabulary:
    """Logits [n, V] of one model. Only the live student's carry a gradient."""

    def __init__(self, logits: Tensor, parent: tuple[Vocabulary, Tensor] | None = None):
        self.logits = logits
        self.parent = parent
        self.known: dict[float, tuple[Tensor, Tensor]] = {}

    def statistics(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Normaliser [n, 1], the log sum exp of the logits over `temperature`, and entropy [n] in nats. No gradient; computed once."""
        if temperature not in self.known:
            if self.parent is None:
                self.known[temperature] = statistics(self.logits.detach(), temperature)
            else:
                whole, index = self.parent
                normaliser, entropy = whole.statistics(temperature)
                self.known[temperature] = normaliser[index], entropy[index]
        return self.known[temperature]

    def at(self, ids: Tensor) -> Tensor:
        """[n, k]: log-probs at ids [n, k]."""
        return _LogpAt.apply(self.logits, ids, self.statistics()[0])

    def select(self, index: Tensor) -> Vocabulary:
        """Some of the positions."""
        return Vocabulary(self.logits[index], (self, index))


def divergence(
    kind: Kind, student: Vocabulary, teacher: Vocabulary, temperature: float = 1.0, cap: float | None = None
) -> Tensor:
    """[n]: `maths.divergence` of the log-probs of student and teacher, logits over `temperature`. The gradient is the student's."""
    z, y = student.logits, teacher.logits
    if z.shape != y.shape:
        raise ValueError(
            f"student logits {list(z.shape)} and teacher logits {list(y.shape)} differ in shape: a divergence over the whole "
            "vocabulary compares the same ids on both sides"
        )
    return _Divergence.apply(z, y.detach(), student.statistics(temperature)[0], teacher.statistics(temperature)[0], kind, temperature, cap)


# ---------------------------------------------------------------------------------------------------------------- passes


def statistics(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Normaliser [n, 1] and entropy [n] of logits [n, V] over `temperature`."""
    if (kernels := fused(logits.device.type)) is not None:
        return kernels.statistics(logits, temperature)
    normaliser, entropy = logits.new_empty(len(logits), 1), logits.new_empty(len(logits))
    for at in blocks(logits):
        x = scaled(logits[at], temperature)
        highest = x.amax(-1, keepdim=True)
        below = (x - highest).clamp_min_(LOWEST)
        weight = below.exp()
        total = weight.sum(-1, keepdim=True)
        torch.add(highest, total.log(), out=normaliser[at])
        entropy[at] = (total.log() - weight.mul_(below).sum(-1, keepdim=True) / total)[:, 0]
    return normaliser, entropy


class _LogpAt(torch.autograd.Function):
    """Log-probs [n, k] at ids [n, k] of logits [n, V] with normalisers [n, 1]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, normaliser: Tensor) -> Tensor:
        ctx.save_for_backward(logits, ids, normaliser)
        return logits.gather(-1, ids) - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, ids, normaliser = ctx.saved_tensors
        total = grad.sum(-1, keepdim=True)
        out = torch.empty_like(logits)
        for at in blocks(logits):
            torch.sub(logits[at], normaliser[at], out=out[at]).exp_().mul_(-total[at])
        return out.scatter_add_(-1, ids, grad), None, None


class _Divergence(torch.autograd.Function):
    """Divergence [n] of logits z, y [n, V] with normalisers lz, ly [n, 1]. Nothing of size [n, V] is kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, y: Tensor, lz: Tensor, ly: Tensor, kind: Kind, temperature: float, cap: float | None
    ) -> Tensor:
        ctx.rule = kind, temperature, cap
        form = formula(kind) if cap is None else None
        kernels = None if form is None else fused(z.device.type)
        if kernels is not None:
            value, total = kernels.values(form, z, y, lz, ly, temperature)
            ctx.save_for_backward(z, y, lz, ly, total)
            return value
        ctx.save_for_backward(z, y, lz, ly)
        value = z.new_empty(len(z))
        for at in blocks(z):
            ls, lt = logps(z[at], lz[at], temperature), logps(y[at], ly[at], temperature)
            value[at] = maths.divergence(kind, ls, lt, cap) if form is None else _value(form, ls, lt)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kind, temperature, cap = ctx.rule
        z, y, lz, ly, *total = ctx.saved_tensors
        form = formula(kind) if cap is None else None
        nothing = (None,) * 6
        if total:
            return fused(z.device.type).gradients(form, z, y, lz, ly, temperature, total[0], grad), *nothing  # type: ignore[union-attr]
        out = torch.empty_like(z)
        for at in blocks(z):
            ls, lt = logps(z[at], lz[at], temperature), logps(y[at], ly[at], temperature)
            slope, p = _taken(kind, cap, ls, lt) if form is None else _slope(form, ls, lt)
            slope.addcmul_(p, slope.sum(-1, keepdim=True), value=-1)
            torch.mul(slope, grad[at, None] / temperature, out=out[at])
        return out, *nothing


# ------------------------------------------------------------------------------- one block: log-probs ls, lt are overwritten


def _value(form: Formula, ls: Tensor, lt: Tensor) -> Tensor:
    """[r]: see `formula`."""
    floor_(ls), floor_(lt)
    if form.a == 0:
        return lt.exp().mul_(lt.sub_(ls)).sum(-1)
    if form.a == 1:
        return ls.exp().mul_(ls.sub_(lt)).sum(-1)
    p, q = ls.exp(), lt.exp()
    m = mixture(form, p, q).log_()
    value = q.mul_(lt.sub_(m)).sum(-1) * form.t if form.t else 0.0
    return value + p.mul_(ls.sub_(m)).sum(-1) * form.s if form.s else value  # type: ignore[return-value]


def _slope(form: Formula, ls: Tensor, lt: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and student probabilities [r, V]: see `formula`."""
    p = ls.exp()  # exactly 0 where the student rules an entry out, and so the slope
    if form.a == 0:
        return lt.exp_().neg_().masked_fill_(ls == -torch.inf, 0.0), p
    floor_(ls), floor_(lt)
    if form.a == 1:
        return ls.sub_(lt).mul_(p), p
    q = lt.exp_()
    mix = mixture(form, p, q)
    if not form.s:
        return q.mul_(p).div_(mix).mul_(form.k), p
    slope = ls.sub_(mix.log()).mul_(p).mul_(form.s)
    return (slope.addcdiv_(q.mul_(p), mix, value=form.k) if form.k else slope), p


def mixture(form: Formula, p: Tensor, q: Tensor) -> Tensor:
    """a q + (1 - a) p; at least the least normal number, as both may have underflowed."""
    return (p * (1 - form.a)).add_(q, alpha=form.a).clamp_min_(torch.finfo(p.dtype).tiny)


def _taken(kind: Kind, cap: float | None, ls: Tensor, lt: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and student probabilities [r, V] of any divergence, by autograd."""
    with torch.enable_grad():
        value = maths.divergence(kind, ls.requires_grad_(), lt, cap).sum()
        slope = torch.autograd.grad(value, ls)[0] if value.requires_grad else torch.zeros_like(ls)
    return slope, ls.detach().exp_()


def scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def logps(logits: Tensor, normaliser: Tensor, temperature: float) -> Tensor:
    return scaled(logits, temperature) - normaliser


def floor_(logp: Tensor) -> Tensor:
    """`maths.finite`, in place."""
    return logp.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=maths.LOGP_FLOOR)


def blocks(x: Tensor) -> Iterator[slice]:
    """Rows of [n, V], block by block; where launching a kernel costs more than the memory, one block."""
    size = max(1, BLOCK_ENTRIES * torch.get_num_threads() // x.shape[-1]) if x.device.type == "cpu" else max(1, len(x))
    for start in range(0, len(x), size):
        yield slice(start, min(len(x), start + size))


@cache
def fused(device: str) -> ModuleType | None:
    """The Triton kernels, where they run: on a GPU, and under TRITON_INTERPRET=1 (how they are tested) on the CPU."""
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    try:
        from opdkit.kernels import fused
    except ImportError:
        return None
    try:
        fused.statistics(torch.zeros(1, 2, device=device), 1.0)
    except Exception as e:  # no C compiler for its launcher, a GPU it does not know: whatever it is, PyTorch's own kernels do it
        warnings.warn(f"Triton is installed but does not run here, PyTorch's own kernels are used instead, slower: {e}", stacklevel=2)
        return None
    return fused
