"""Random steps, and what a naive reference needs of them: every formula over whole log-probs, by
autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opdkit.methods.method import Method
from opdkit.testing import Case

GROUPS = [0, 0, 0, 1, 1, 1]


def step(seed: int, fresh: bool, models: Sequence[str] = ("teacher",), **settings: Any) -> Case:
    """Six ragged rollouts of two prompts, one with a hole. Not `fresh`: the student has moved since
    the step began, and what sampled was another policy again.
    """
    rows, length, vocabulary = 6, 5, 7
    g = torch.Generator().manual_seed(seed)

    def logits(scale: float = 1.0) -> Tensor:  # [B, T, V]
        return scale * torch.randn(rows, length, vocabulary, generator=g, dtype=torch.float64)

    before, drift = logits(), 0.0 if fresh else 0.4
    mask = torch.arange(length) < torch.tensor([5, 3, 1, 4, 5, 2])[:, None]
    mask[0, 2] = False
    return Case(
        torch.randint(vocabulary, (rows, length), generator=g),
        before + logits(drift),
        mask,
        {name: logits() for name in models},
        before,
        before + logits(drift),
        {"group": GROUPS, "reward": torch.rand(rows, generator=g, dtype=torch.float64)},
        settings=settings,
    )


def at(logps: Tensor, tokens: Tensor) -> Tensor:
    """[B, T]: of log-probs [B, T, V], those of the tokens."""
    return logps.gather(-1, tokens[..., None])[..., 0]


def advantages(reward: Tensor, group: Sequence[int], std: bool = False) -> Tensor:
    """[B]: less the mean of the group, over its sample standard deviation if asked for."""
    out = torch.empty_like(reward)
    for b, name in enumerate(group):
        peers = reward[[i for i, other in enumerate(group) if other == name]]
        out[b] = (reward[b] - peers.mean()) / (peers.std() + 1e-6 if std else 1)
    return out


def ppo(r: Tensor, credit: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """[...]: -min(r A, clip(r) A)."""
    return -torch.minimum(r * credit, r.clamp(1 - low, 1 + high) * credit)


def agrees(method: Method, case: Case, reference: Callable[..., Tensor]) -> bool:
    """Whether a method has the loss and the gradient of a naive reference, which takes the
    student's log-probs [B, T, V] with gradient, and those of all models by name.
    """
    leaf = case.student.clone().requires_grad_()
    assert case.before is not None and case.sampler is not None
    others = {"before": case.before, "sampler": case.sampler, **case.models}
    loss = reference(leaf.log_softmax(-1), {k: v.log_softmax(-1) for k, v in others.items()})
    (grad,) = torch.autograd.grad(loss, leaf)
    out = replace(case).run(method.objective, chunk=3)
    assert grad.norm() > 1e-3
    return bool((out.loss - loss).abs() < 1e-8) and bool((out.grad - grad).abs().max() < 1e-8)
