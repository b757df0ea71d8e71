"""Made-up rollouts that several models read, and a method against a formula written on whole
log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.testing import AnyObjective, evaluate

LENGTHS = (6, 4, 1, 5, 3, 6)
GROUP = [0, 0, 0, 1, 1, 1]
REWARD = [1.0, 0.0, 1.0, 0.25, 0.5, 0.0]


@dataclass(frozen=True)
class MadeUp:
    """Log-probs [B, T, V] by model; only those of `student` have a gradient."""

    logp: dict[str, Tensor]
    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool

    def __getitem__(self, model: str) -> Tensor:  # [B, T, V]
        return self.logp[model]

    def at(self, model: str) -> Tensor:
        """[B, T]: log-probs of the tokens."""
        return self.logp[model].gather(-1, self.tokens[..., None])[..., 0]

    def per_token(self, x: Tensor) -> Tensor:
        """[]: mean of [B, T] over all tokens."""
        return x[self.mask].sum() / self.mask.sum()

    def per_row(self, x: Tensor) -> Tensor:
        """[]: mean of [B, T] over each rollout's tokens, then over rollouts."""
        each = torch.where(self.mask, x, 0.0).sum(1) / self.mask.sum(1)
        return each.mean()

    def sums(self, x: Tensor) -> Tensor:
        """[]: sum of [B, T] over tokens, mean over rollouts."""
        return torch.where(self.mask, x, 0.0).sum(1).mean()


def assert_dense(
    method: AnyObjective,
    formula: Callable[[MadeUp], Tensor],
    models: Sequence[str] = ("teacher",),
    reward: bool = False,
    seeds: Sequence[int] = (0, 1),
    **facts: Any,
) -> None:
    """A method's loss and gradient are a formula's, to 1e-8, on rollouts of different length with a
    hole: the student as it was when they were written, or moved from there twice.
    """
    for seed in seeds:
        for moved in (0.0, 0.6):
            g = torch.Generator().manual_seed(seed)
            shape = len(LENGTHS), max(LENGTHS), 9

            def drawn(scale: float, g=g, shape=shape) -> Tensor:
                return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

            sampler = drawn(1.2)
            before = sampler + moved * drawn(1.0)
            leaf = (before + moved * drawn(1.0)).requires_grad_()
            others = {name: drawn(1.2) for name in models}
            tokens = torch.randint(shape[2], shape[:2], generator=g)
            mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
            mask[0, 2] = False
            logits = {"student": leaf, "before": before, "sampler": sampler, **others}
            logp = {name: z.log_softmax(-1) for name, z in logits.items()}
            value = formula(MadeUp(logp, tokens, mask))
            (grad,) = torch.autograd.grad(value, leaf)
            told = {"reward": REWARD, "group": GROUP} if reward else {}
            out = evaluate(
                method,
                leaf.detach(),
                tokens,
                mask,
                models=others,
                before_logits=before,
                sampler_logits=sampler,
                **told,
                **facts,
            )
            torch.testing.assert_close(out.loss, value.detach(), rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(out.grad, grad, rtol=1e-8, atol=1e-8)
            assert grad.abs().max() > 1e-3


def advantages(std: bool) -> Tensor:
    """[B, 1]: of `REWARD` in `GROUP`."""
    r = torch.tensor(REWARD, dtype=torch.float64).view(2, 3)
    a = r - r.mean(1, keepdim=True)
    return (a / (r.std(1, keepdim=True) + 1e-6) if std else a).view(6, 1)


def clipped(ratio: Tensor, credit: Tensor, width: float) -> Tensor:
    """[...]: PPO's loss of ratios and credits."""
    return -torch.minimum(ratio * credit, ratio.clamp(1 - width, 1 + width) * credit)
