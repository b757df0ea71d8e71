"""Naive references over whole vocabularies: made-up rollouts whose log-probs are held as they are,
and what autograd makes of a formula written on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.testing import AnyObjective, evaluate


@dataclass(frozen=True)
class Dense:
    """Log-probs [B, T, V] of each model; only the student's have a gradient."""

    student: Tensor
    before: Tensor
    sampler: Tensor
    teacher: Tensor
    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    noted: Tensor  # [B, T] bool: the tokens of some rollouts

    def at(self, logp: Tensor) -> Tensor:
        """[B, T]: log-probs [B, T, V] of the tokens."""
        return logp.gather(-1, self.tokens[..., None])[..., 0]


def between(ls: Tensor, lt: Tensor, beta: float, cap: float | None = None) -> Tensor:
    """[...]: the generalised Jensen-Shannon divergence of log-probs [..., K], each entry at most
    `cap`.
    """
    p, q = ls.exp(), lt.exp()
    m = (beta * q + (1 - beta) * p).log()
    if beta in (0, 1):
        entries = q * (lt - ls) if beta == 0 else p * (ls - lt)
    else:
        entries = beta * q * (lt - m) + (1 - beta) * p * (ls - m)
    return (entries if cap is None else torch.minimum(entries, torch.tensor(cap).double())).sum(-1)


def bucketed(ls: Tensor, lt: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K + 1] both: log-probs [..., V] at ids [..., K], and of all the rest as one entry."""
    inside = torch.zeros_like(ls, dtype=torch.bool).scatter(-1, ids, True)
    rest = (
        x.exp().masked_fill(inside, 0.0).sum(-1, keepdim=True).log() for x in (ls, lt)
    )  # a sum of what is outside, not what the inside leaves
    return tuple(torch.cat([x.gather(-1, ids), r], -1) for x, r in zip((ls, lt), rest))  # type: ignore[return-value]


def renormalised(ls: Tensor, lt: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] both: log-probs [..., V] of the entries at ids [..., K] among themselves."""
    return ls.gather(-1, ids).log_softmax(-1), lt.gather(-1, ids).log_softmax(-1)


def assert_dense(
    method: AnyObjective,
    formula: Callable[[Dense], Tensor],
    off_policy: bool,
    mark: str = "",
    seed: int = 0,
) -> None:
    """A method's loss and gradient are those of a formula, to 1e-8: on rollouts of different length
    with a hole, the student where it was when they were written or (`off_policy`) moved from there
    twice; some of them with `mark`.
    """
    g = torch.Generator().manual_seed(seed)
    rows, length, vocabulary = 5, 6, 9

    def drawn(scale: float) -> Tensor:
        return scale * torch.randn(rows, length, vocabulary, generator=g, dtype=torch.float64)

    sampler, teacher = drawn(1.5), drawn(1.5)
    before = sampler + (drawn(0.7) if off_policy else 0.0)
    leaf = (before + (drawn(0.7) if off_policy else 0.0)).requires_grad_()
    tokens = torch.randint(vocabulary, (rows, length), generator=g)
    mask = torch.arange(length) < torch.tensor([6, 4, 1, 5, 3])[:, None]
    mask[0, 4] = False
    noted = (torch.arange(rows) % 2 == 1)[:, None].expand(rows, length)
    each = (x.log_softmax(-1) for x in (leaf, before, sampler, teacher))
    value = formula(Dense(*each, tokens, mask, noted))
    (grad,) = torch.autograd.grad(value, leaf)
    out = evaluate(
        method,
        leaf.detach(),
        tokens,
        mask,
        models={"teacher": teacher},
        before_logits=before,
        sampler_logits=sampler,
        marks={mark: noted} if mark else None,
    )
    torch.testing.assert_close(out.loss, value.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(out.grad, grad, rtol=1e-8, atol=1e-8)
    assert grad.abs().max() > 1e-3
