"""Rollouts of different lengths from the log-probs of their sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opdkit.testing import AnyObjective, Evaluation, evaluate
from tests.methods.toy import binary

Rows = Sequence[Sequence[float]]
LEVEL = -1.5  # log-prob of every sampled token where only differences matter


def ragged(rows: Rows, fill: float = LEVEL) -> Tensor:
    """[B, T, 2]: token 0 has these log-probs, `fill` behind the end of a row."""
    length = max(map(len, rows))
    return torch.cat([binary([*row, *[fill] * (length - len(row))]) for row in rows])


def mask_of(rows: Rows) -> Tensor:
    """[B, T] bool."""
    length = max(map(len, rows))
    return torch.tensor([[t < len(row) for t in range(length)] for row in rows])


def on(method: AnyObjective, student: Rows, **facts) -> Evaluation:
    """`evaluate` with log-probs [B][T] of the sampled tokens; models, before and sampler are given
    in the same way.
    """
    models = {name: ragged(rows) for name, rows in facts.pop("models", {}).items()}
    others = {
        f"{name}_logits": ragged(facts.pop(name)) for name in ("before", "sampler") if name in facts
    }
    s, mask = ragged(student), mask_of(student)
    return evaluate(
        method, s, torch.zeros_like(mask, dtype=torch.int64), mask, models=models, **others, **facts
    )


def shifted(rows: Rows, by: float | Rows = LEVEL) -> list[list[float]]:
    """The rows with a number, or other rows, added."""
    return [
        [x + (by if isinstance(by, float) else by[b][t]) for t, x in enumerate(row)]
        for b, row in enumerate(rows)
    ]


def slopes(out: Evaluation, student: Rows) -> Tensor:
    """[number of trained tokens]: d loss / d log-prob of each sampled token, row by row."""
    slope = out.grad[..., 0] / (1 - ragged(student).softmax(-1)[..., 0])
    return slope[mask_of(student)]
