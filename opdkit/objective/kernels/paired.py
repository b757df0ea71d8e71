"""Two distributions over different vocabularies, compared by rank, or token by token where tokens
correspond.

Each comparison gives its value and its slope with respect to the student's probabilities, block by
block: a chunk keeps one [n, V] gradient and no sorted copy. On a CPU numpy sorts: 17 times the
speed of torch at 151936 entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opdkit.objective.divergences import Kind
from opdkit.objective.kernels.vocabulary import blocks

FLOOR = 1e-8  # least probability whose logarithm is taken
# of the type's rounding error, relative to the larger: two probabilities closer than that are tied
ROUNDING = 16


@dataclass(frozen=True, eq=False)
class Match:
    """Which tokens of two vocabularies correspond, and which are left on each side."""

    student: Tensor  # [M] ids of the student's tokens
    teacher: Tensor  # [M] ids of the teacher's tokens that correspond to them
    student_rest: Tensor
    teacher_rest: Tensor

    @staticmethod
    def of(same: Tensor, vocabulary: int) -> Match:
        """From `same` [V_t], the student's id of each of the teacher's tokens (-1: none), and the
        student's V_s.
        """
        teacher = (same >= 0).nonzero()[:, 0]
        student = same[teacher]
        rest = torch.ones(vocabulary, dtype=torch.bool, device=same.device).index_fill(
            0, student, False
        )
        return Match(student, teacher, rest.nonzero()[:, 0], (same < 0).nonzero()[:, 0])

    @property
    def share(self) -> float:
        """Of the teacher's tokens, how many the student has."""
        return len(self.teacher) / max(1, len(self.teacher) + len(self.teacher_rest))


class SortedComparison(Protocol):
    """A number for p [r, V_s] and q [r, V_t] of rows `at`: value [r] and its slope [r,
    V_s] in p.
    """

    def __call__(self, p: Tensor, q: Tensor, at: slice) -> tuple[Tensor, Tensor]: ...


def compare(
    comparison: SortedComparison,
    z: Tensor,
    scale: Tensor,
    y: Tensor,
    other: Tensor,
    temperatures: tuple[float, float],
) -> Tensor:
    """[n]: a comparison of exp(scale) softmax(z) and exp(other) softmax(y), for logits z [n, V_s],
    y [n, V_t] and log-factors [n].

    Logits are divided by `temperatures`, the student's and the teacher's. The gradient goes to z
    and scale.
    """
    return _Compare.apply(z, scale, y.to(z.dtype), other.to(z.dtype), comparison, temperatures)


class _Compare(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        scale: Tensor,
        y: Tensor,
        other: Tensor,
        comparison: SortedComparison,
        temperatures: tuple[float, float],
    ) -> Tensor:
        values, to_z, to_scale = z.new_empty(len(z)), torch.empty_like(z), torch.empty_like(scale)
        for at in blocks(z):
            share = (z[at] / temperatures[0]).softmax(-1)
            p = share * scale[at, None].exp()
            q = (y[at] / temperatures[1]).softmax(-1) * other[at, None].exp()
            values[at], slope = comparison(p, q, at)
            slope.mul_(p)
            to_scale[at] = slope.sum(-1)
            torch.addcmul(slope, share, to_scale[at, None], value=-1, out=to_z[at])
        ctx.save_for_backward(to_z.div_(temperatures[0]), to_scale)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        to_z, to_scale = ctx.saved_tensors
        return to_z * grad[:, None], to_scale * grad, None, None, None, None


def by_rank(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """[r] and slope [r, V_s] of p [r, V_s] and q [r, V_t]: sum_k |p^(k) - q^(k)|, the k-th largest
    of each, the shorter continued with zeros; slope 0 where they are equal.
    """
    ranked, order = descending(p)
    width = max(p.shape[-1], q.shape[-1])
    a, b = (
        torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (ranked, descending_values(q))
    )
    gap = a - b
    tied = gap.abs() <= ROUNDING * torch.finfo(p.dtype).eps * torch.maximum(a, b)
    sign = gap.sign().masked_fill_(tied, 0.0)[..., : p.shape[-1]]
    return gap.abs().sum(-1), torch.empty_like(p).scatter_(-1, order, sign)


def by_token(kind: Kind, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """[r] and slope [r, K] of p, q [r, K]: a divergence of probabilities as they are, whatever they
    sum to; logarithms of at least `FLOOR`.
    """
    with torch.enable_grad():
        leaf = p.detach().requires_grad_()
        value = kind.entries(leaf.clamp_min(FLOOR).log(), q.clamp_min(FLOOR).log()).sum(-1)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


# ------------------------------------------------------------------------------------------ sorting


def descending(p: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [r, V] from the largest, and their ids."""
    if p.device.type != "cpu":
        ranked = p.sort(-1, descending=True)
        return ranked.values, ranked.indices
    import numpy as np

    numbers = p.numpy()
    # not negative, so their bits rank as they do: numbers and ids are sorted as one integer
    if p.dtype == torch.float32:
        ids = np.arange(p.shape[-1], dtype=np.int64)
        keys = numbers.view(np.int32).astype(np.int64)
        keys <<= 32
        keys |= ids
        keys.sort(-1)
        order = np.flip(keys & 0xFFFFFFFF, -1)
    else:
        order = np.flip(numbers.argsort(-1), -1)
    ids_of = torch.from_numpy(order.copy())
    return p.gather(-1, ids_of), ids_of


def descending_values(p: Tensor) -> Tensor:
    """Probabilities [r, V] from the largest."""
    if p.device.type != "cpu":
        return p.sort(-1, descending=True).values
    import numpy as np

    return torch.from_numpy(np.flip(np.sort(p.numpy(), -1), -1).copy())
