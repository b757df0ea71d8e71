"""One model's logits at a chunk of positions, and what losses read off them.

A pass goes block by block, so that on a CPU its intermediate results are small and stay in the
cache. On a GPU the same sums are Triton kernels (`fused`), where Triton runs and the divergence has
a formula; else a pass is one block.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from opdkit.objective import divergences
from opdkit.objective.divergences import Kind
from opdkit.objective.kernels.formula import Formula, derived, formula

BLOCK_ENTRIES = 1 << 17  # of one block on one CPU core: 512 KiB in float32
# stands for -inf below the highest logit of a row: its exponential is zero, and zero times it is
# zero
LOWEST = -1e4


class Vocabulary:
    """Logits [n, V] of one model. Only the live student's carry a gradient.

    The operations are the same for student and others: models that agree do so to the last bit, and
    |p_s - p_t| has no gradient of noise.
    """

    def __init__(self, logits: Tensor, parent: tuple[Vocabulary, Tensor] | None = None):
        self.logits = logits  # [n, V]
        self.parent = parent  # of which these are some, and which: [n]
        self.known: dict[float, tuple[Tensor, Tensor]] = {}

    def statistics(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Normaliser [n, 1], the log sum exp of the logits over `temperature`, and entropy [n] in
        nats. No gradient; computed once.
        """
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

    def logps(self, temperature: float = 1.0) -> Tensor:
        """[n, V]: log-probs of the logits over `temperature`."""
        return _LogProbs.apply(self.logits, self.statistics(temperature)[0], temperature)

    def select(self, index: Tensor) -> Vocabulary:
        """Some of the positions, by their index [m] in [n]."""
        return Vocabulary(self.logits[index], (self, index))


def divergence(
    kind: Kind,
    student: Vocabulary,
    teacher: Vocabulary,
    temperature: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """[n]: `divergences.divergence` of student and teacher, logits over `temperature`.

    The gradient is the student's.
    """
    z, y = student.logits, teacher.logits
    if z.shape != y.shape:
        raise ValueError(
            f"student logits {list(z.shape)} and teacher logits {list(y.shape)} differ in shape: a "
            "divergence over the whole vocabulary compares the same ids on both sides"
        )
    normalisers = student.statistics(temperature)[0], teacher.statistics(temperature)[0]
    return _Divergence.apply(z, y.detach(), *normalisers, Rule(kind, temperature, cap))


# ------------------------------------------------------------------------------------------- passes


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


class _LogProbs(torch.autograd.Function):
    """Log-probs [n, V] of logits [n, V] over a temperature, with normalisers [n, 1]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, normaliser: Tensor, temperature: float) -> Tensor:
        logp = scaled(logits, temperature) - normaliser
        ctx.save_for_backward(logp)
        ctx.temperature = temperature
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (logp,) = ctx.saved_tensors
        return (
            logp.exp().mul_(-grad.sum(-1, keepdim=True)).add_(grad).div_(ctx.temperature),
            None,
            None,
        )


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
        gradient = torch.empty_like(logits)
        for at in blocks(logits):
            torch.sub(logits[at], normaliser[at], out=gradient[at]).exp_().mul_(-total[at])
        return gradient.scatter_add_(-1, ids, grad), None, None


class _Divergence(torch.autograd.Function):
    """Divergence [n] of logits z, y [n, V] with normalisers lz, ly [n, 1]."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, lz: Tensor, ly: Tensor, rule: Rule) -> Tensor:
        ctx.rule, ctx.gradient, ctx.total = rule, None, None
        ctx.save_for_backward(z, y, lz, ly)
        if (kernels := rule.kernels(z)) is not None:
            value, ctx.total = kernels.values(rule.formula, z, y, lz, ly, rule.temperature)
        else:
            ctx.gradient = torch.empty_like(z) if ctx.needs_input_grad[0] else None
            value = _values(rule, z, y, lz, ly, ctx.gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rule, (z, y, lz, ly) = ctx.rule, ctx.saved_tensors
        if ctx.total is not None:
            gradient = rule.kernels(z).gradients(
                rule.formula, z, y, lz, ly, rule.temperature, ctx.total, grad
            )
        else:
            # scaled in place: a second backward makes its own
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None:
                gradient = torch.empty_like(z)
                _values(rule, z, y, lz, ly, gradient)
            gradient.mul_(grad[:, None] / rule.temperature)
        return gradient, None, None, None, None


@dataclass(frozen=True)
class Rule:
    """Which divergence."""

    kind: Kind
    temperature: float
    cap: float | None

    @property
    def formula(self) -> Formula | None:
        return formula(self.kind)

    def kernels(self, logits: Tensor) -> ModuleType | None:
        """The kernels for logits [n, V], where there are some for this divergence."""
        if self.formula is None or self.cap is not None:
            return None
        return fused(logits.device.type)


def _values(
    rule: Rule, z: Tensor, y: Tensor, lz: Tensor, ly: Tensor, gradient: Tensor | None
) -> Tensor:
    """[n]: the divergences.

    `gradient` [n, V], if any, receives theirs with respect to the scaled logits.
    """
    values, form = z.new_empty(len(z)), rule.formula
    for at in blocks(z):
        ls, lt = scaled(z[at], rule.temperature) - lz[at], scaled(y[at], rule.temperature) - ly[at]
        values[at], slope, p = _taken(rule, ls, lt) if form is None else _derived(rule, ls, lt)
        if gradient is not None:
            torch.addcmul(slope, p, slope.sum(-1, keepdim=True), value=-1, out=gradient[at])
    return values


def _derived(rule: Rule, ls: Tensor, lt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value [r], slope and student probabilities [r, V] of log-probs [r, V], which are overwritten:
    see `formula`.
    """
    assert rule.formula is not None
    entries, slope, p = derived(rule.formula, ls, lt, rule.cap)
    return entries.sum(-1), slope, p


def _taken(rule: Rule, ls: Tensor, lt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value [r], slope and student probabilities [r, V]: as `_derived`, for any divergence, by
    autograd.
    """
    with torch.enable_grad():
        value = divergences.divergence(rule.kind, ls.requires_grad_(), lt, rule.cap)
        slope = (
            torch.autograd.grad(value.sum(), ls)[0] if value.requires_grad else torch.zeros_like(ls)
        )
    return value.detach(), slope, ls.detach().exp_()


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """[n, V]: logits [n, V] over a temperature."""
    return logits if temperature == 1.0 else logits / temperature


def blocks(x: Tensor, elsewhere: int | None = None) -> Iterator[slice]:
    """Rows of [n, V], block by block; where launching a kernel costs more than the memory, one
    block, or those of so many entries.
    """
    cpu = x.device.type == "cpu"
    entries = BLOCK_ENTRIES * torch.get_num_threads() if cpu else elsewhere or x.numel()
    size = max(1, entries // x.shape[-1])
    for start in range(0, len(x), size):
        yield slice(start, min(len(x), start + size))


@cache
def fused(device: str) -> ModuleType | None:
    """The Triton kernels, where they run: on a GPU, and under TRITON_INTERPRET=1 (how they are
    tested) on the CPU.
    """
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    try:
        from opdkit.objective.kernels import fused
    except ImportError:
        return None
    try:
        fused.statistics(torch.zeros(1, 2, device=device), 1.0)
    # no C compiler for its launcher, a GPU it does not know: whatever it is, PyTorch's own kernels
    # do it
    except Exception as e:
        warnings.warn(
            "Triton is installed but does not run here, PyTorch's own kernels are used instead, "
            f"slower: {e}",
            stacklevel=2,
        )
        return None
    return fused
