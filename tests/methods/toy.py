"""Distributions with answers known by hand, and expected gradients by enumeration over what could
have been sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opdkit.testing import AnyObjective, evaluate

P_S, P_T = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)


def logits(*rows: Sequence[float]) -> Tensor:
    """[1, T, V]: one rollout, from the distribution at each position."""
    return torch.tensor([rows], dtype=torch.float64).log()


def tokens(*ids: int) -> Tensor:
    """[1, T]."""
    return torch.tensor([ids])


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(a: Tensor, b: Tensor | Sequence[float] | float, digits: int = 6) -> bool:
    """Equal to as many digits as are printed."""
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=0.51 * 10**-digits)


def expected(method: AnyObjective, student: Sequence[float], teacher: Sequence[float]) -> Tensor:
    """[V]: the gradient at one position, averaged over the token that the student may
    sample there.
    """
    s, t = logits(student), logits(teacher)
    return sum(
        p * evaluate(method, s, tokens(y), models={"teacher": t}).grad[0, 0]
        for y, p in enumerate(student)
    )  # type: ignore[return-value]


def reverse_kl_gradient(student: Sequence[float], teacher: Sequence[float]) -> Tensor:
    """[V]: d KL(student || teacher) / d student logits = p (log p/q - KL)."""
    p, q = numbers(*student), numbers(*teacher)
    return p * ((p / q).log() - (p * (p / q).log()).sum())


def binary(logps: Sequence[float]) -> Tensor:
    """[1, T, 2]: token 0 has these log-probs."""
    return logits(*((math.exp(x), 1 - math.exp(x)) for x in logps))


def with_entropy(nats: float, vocabulary: int = 16) -> Tensor:
    """[V]: one favourite token, the rest equal, with this entropy."""

    def spread(top: float) -> Tensor:
        return torch.full(
            (vocabulary,), (1 - top) / (vocabulary - 1), dtype=torch.float64
        ).index_fill(0, torch.tensor(0), top)

    low, high = 1 / vocabulary, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        p = spread(middle)
        low, high = (middle, high) if -(p * p.log()).sum() > nats else (low, middle)
    return spread(low)


def at_distance(student: Tensor, nats: float) -> Tensor:
    """[V]: a teacher with KL(student || teacher) = nats, the student with mass moved to the last
    token.
    """
    aim = torch.zeros_like(student).index_fill(0, torch.tensor(len(student) - 1), 1.0)
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        t = (1 - middle) * student + middle * aim
        low, high = (
            (middle, high) if (student * (student / t).log()).sum() < nats else (low, middle)
        )
    return (1 - low) * student + low * aim
