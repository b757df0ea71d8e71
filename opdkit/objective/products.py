"""A language-model head, and its three products: hidden states x weight, and the two of its
gradient.

With operands of 16 bits, sums and results are float32: rounding a logit to 16 bits would cost more
than the operands do, as two that differ by less than 1/128 of their size become equal. A GPU
multiplies 16-bit operands into float32 itself. Elsewhere a block of the weight at a time is widened
and multiplied in float32: the product of two bfloat16 numbers is exact there, so the numbers are
the same, and on a CPU it is faster by far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.objective.actions import Actions

BLOCK = 1 << 20  # entries of a weight that are widened at once: 4 MiB, which a CPU's cache holds
GPU_BLOCK = 1 << 26
WIDE = torch.float32


@dataclass(frozen=True)
class Head:
    """A language-model head: hidden states [n, H] to logits [n, V], float32 (float64 if the weight
    is).

    logits = cap(scale * (hidden @ weight.T + bias)), cut to the first `vocab` rows: rows that only
    pad the matrix to a round size are removed, never filled. With `actions` only the last rows of
    those are multiplied, and all ids before them have the logit -inf. Without a weight the hidden
    states are the logits (used by `evaluate`). Hidden states and weight are rounded to `operands`;
    nothing else is.
    """

    weight: Tensor | None = None  # [V', H]
    bias: Tensor | None = None  # [V']
    scale: float = 1.0
    softcap: float | None = None  # c * tanh(x / c), as in Gemma 2
    vocab: int | None = None  # rows kept
    operands: torch.dtype | None = None  # None: the weight's own
    actions: Actions | None = None  # of a policy that writes the last ids only

    @property
    def rounds_to(self) -> torch.dtype | None:
        """What hidden states and weight are rounded to; None without a weight."""
        return self.operands or (None if self.weight is None else self.weight.dtype)

    @property
    def mixed(self) -> bool:
        """Whether its products are taken as below, not by PyTorch's own in one type."""
        kept = None if self.weight is None else self.weight.dtype
        rounds_to = self.rounds_to
        return rounds_to is not None and (narrow(rounds_to) or rounds_to != kept)

    def ready(self) -> Head:
        """The same head for many products: on a GPU its weight is rounded once."""
        weight, to = self.weight, self.rounds_to
        if weight is None or to is None or not weight.is_cuda or not narrow(to):
            return self
        return replace(self, weight=weight.detach()[: self.vocab].to(to))

    def kept(self, hidden: Tensor) -> Tensor:
        """[..., H]: hidden states [..., H] to be kept for the product, no wider than it takes
        them.
        """
        to = self.rounds_to
        return hidden.to(to) if to is not None and narrow(to) else hidden

    def states(self, hidden: Tensor) -> Tensor:
        """[n, H]: hidden states [n, H] as others may read them, the same of all models that agree:
        rounded as the product takes them, with the gradient of those that are not; where they are
        the logits, cut like these.
        """
        if self.weight is None or self.rounds_to is None:
            return hidden[..., : self.vocab]
        if not narrow(self.rounds_to):
            return hidden
        whole = hidden.float()
        return whole + (self.kept(whole).float() - whole).detach()

    @property
    def first(self) -> int:
        """The first id that can be written: of those before it there is no product."""
        if self.actions is None:
            return 0
        rows = self.vocab if self.weight is None else self.size(self.weight)
        assert rows is not None, "logits without a weight say how many they are in `vocab`"
        return self.actions.first(rows)

    def rows(self, product: Tensor) -> slice:
        """The ids that a product [n, W], or its gradient, is of."""
        return slice(self.first, self.first + product.shape[-1])

    def finish(self, logits: Tensor) -> Tensor:
        """[n, V]: what follows the matrix product [n, W]."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.actions is None else self.actions.spread(logits, self.first)

    def product(self, hidden: Tensor) -> Tensor:
        """[n, W]: the matrix product, with bias, of the rows that are kept; W = V without
        `actions`.
        """
        if self.weight is None or self.rounds_to is None:
            return self.states(hidden)[..., self.first :]
        at = slice(self.first, self.vocab)
        weight = self.weight[at]
        bias = None if self.bias is None else self.bias[at]
        with torch.autocast(weight.device.type, enabled=False):
            if not self.mixed:
                return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
            out = times_weight(hidden.flatten(0, -2), weight, self.rounds_to)
        return (out if bias is None else out + bias).unflatten(0, hidden.shape[:-1])

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] of hidden states [n, H]."""
        return self.finish(self.product(hidden))

    def slope_to_hidden(self, slope: Tensor, width: int) -> Tensor:
        """[n, width]: the gradient in the hidden states, of one [n, W] in the product."""
        at = self.rows(slope)
        if self.weight is None or self.rounds_to is None:
            return torch.nn.functional.pad(slope, (at.start, width - at.stop))
        weight = self.weight[at]
        if self.mixed:
            return slope_to_hidden(slope, weight, self.rounds_to)
        with torch.autocast(weight.device.type, enabled=False):
            return slope @ weight

    def add_slope_to_weight(self, total: Tensor, slope: Tensor, hidden: Tensor) -> None:
        """Adds the gradient in the weight, of one [n, W] in the product of hidden states [n, H], to
        a total [V', H].
        """
        rows = total[self.rows(slope)]
        if self.mixed and self.rounds_to is not None:
            add_slope_to_weight(rows, slope, hidden, self.rounds_to)
        else:
            rows.addmm_(slope.T.to(total.dtype), hidden.to(total.dtype))

    def size(self, hidden: Tensor) -> int:
        """Number of vocabulary entries, of hidden states [..., H]."""
        rows = hidden.shape[-1] if self.weight is None else len(self.weight)
        return rows if self.vocab is None else min(rows, self.vocab)


# ----------------------------------------------------------------------- operands of other types


def narrow(dtype: torch.dtype) -> bool:
    """Whether numbers of a type have 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


def times_weight(hidden: Tensor, weight: Tensor, operands: torch.dtype) -> Tensor:
    """[n, V]: float32 products of hidden states [n, H] and weight [V, H], both rounded to
    `operands` first; differentiable.
    """
    return _TimesWeight.apply(hidden, weight, operands)


class _TimesWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, operands: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.operands = operands
        if _on_chip(hidden, operands):
            return torch.mm(hidden.to(operands), weight.to(operands).T, out_dtype=WIDE)
        states = _widened(hidden, operands)
        out = torch.empty(len(hidden), len(weight), dtype=WIDE, device=hidden.device)
        for at in _blocks(weight, BLOCK):
            torch.mm(states, _widened(weight[at], operands).T, out=out[:, at])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = slope_to_hidden(grad, weight, ctx.operands).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            total = torch.zeros(weight.shape, dtype=WIDE, device=weight.device)
            add_slope_to_weight(total, grad, hidden, ctx.operands)
            d_weight = total.to(weight.dtype)
        return d_hidden, d_weight, None


def slope_to_hidden(slope: Tensor, weight: Tensor, operands: torch.dtype) -> Tensor:
    """[n, H]: a float32 slope [n, V] times weight [V, H] rounded to `operands`; the slope is not
    rounded.
    """
    if _on_chip(slope, operands):
        both = torch.mm(in_two(slope, operands), weight.to(operands), out_dtype=WIDE)
        return both.view(2, *slope.shape[:1], -1).sum(0)
    out = torch.zeros(len(slope), weight.shape[1], dtype=WIDE, device=slope.device)
    for at in _blocks(weight, BLOCK):
        out.addmm_(slope[:, at], _widened(weight[at], operands))
    return out


def add_slope_to_weight(
    total: Tensor, slope: Tensor, hidden: Tensor, operands: torch.dtype
) -> None:
    """Adds a float32 slope [n, V], transposed, times hidden states [n, H] rounded to `operands` to
    a float32 total [V, H].
    """
    if not _on_chip(slope, operands):
        total.addmm_(slope.T, _widened(hidden, operands))
        return
    both, states = in_two(slope, operands), hidden.to(operands).repeat(2, 1)
    for at in _blocks(total, GPU_BLOCK):
        total[at] += torch.mm(both[:, at].T, states, out_dtype=WIDE)


def in_two(slope: Tensor, operands: torch.dtype) -> Tensor:
    """[2n, V]: a float32 slope [n, V] as the sum of two 16-bit numbers, one above the other: off by
    at most 2^-18 of its size, where one alone is by 2^-9.
    """
    first = slope.to(operands)
    return torch.cat([first, (slope - first).to(operands)])


def _widened(x: Tensor, operands: torch.dtype) -> Tensor:
    """[...]: rounded to `operands`, in float32."""
    return x.to(operands).to(WIDE)


def _blocks(weight: Tensor, entries: int) -> Iterator[slice]:
    """Rows of a weight [V, H], so many entries at a time."""
    size = max(1, entries // weight.shape[1])
    for start in range(0, len(weight), size):
        yield slice(start, min(len(weight), start + size))


def _on_chip(x: Tensor, operands: torch.dtype) -> bool:
    """Whether the device of a tensor [...] multiplies 16-bit operands into float32 by itself."""
    return x.is_cuda and narrow(operands) and "dtype" in torch.ops.aten.mm.overloads()
