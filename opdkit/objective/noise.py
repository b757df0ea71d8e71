"""Noise on what the layers of the student that learns are given, its width learnt with the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opdkit.base.errors import UserError
from opdkit.objective.companion import Around, Companion, CompanionState, Hear, Trained
from opdkit.objective.maths import keyed_normal
from opdkit.types import Rollout, row_keys


@dataclass(frozen=True)
class LayerNoise(Companion):
    """Normal noise of width sigma_l on the input of each decoder layer l, only while the student
    learns: it writes, is scored and is evaluated without.

    log sigma_l is learnt, from the gradient that reaches the noise, by an AdamW of its own.
    """

    disturbs: ClassVar[bool] = True
    sigma: float = 0.01  # at the start
    layers: tuple[int, int] | None = None  # the first, from 0, and the one behind the last
    learning_rate: float = 5e-4  # of log sigma; 0: the widths stay

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf or not 0 <= self.learning_rate < math.inf:
            raise ValueError(
                f"sigma={self.sigma} must be positive and learning_rate={self.learning_rate} at "
                "least 0, both finite: they are a width and a step size"
            )
        if self.layers is not None and not _is_range(self.layers):
            raise ValueError(
                f"layers={self.layers!r} must be (start, end), two integers with 0 <= start < end: "
                "the layers with noise are start to end - 1, counted from 0"
            )

    def build(self, around: Around) -> CompanionState:
        start, end = (0, len(around.layers)) if self.layers is None else self.layers
        if not 0 <= start < end <= len(around.layers):
            raise UserError(
                f"{self} puts noise on layers {start} to {end - 1}, and the student has "
                f"{len(around.layers)} (none on plain logits): layers=(start, end) count from 0, "
                "and the one at `end` has none"
            )
        return Noisy(self, around, start, end)


def _is_range(layers: object) -> bool:
    """Whether it is a pair of integers, of which the first is at least 0 and the lower."""
    pair = isinstance(layers, tuple) and [type(x) for x in layers] == [int, int]
    return pair and 0 <= layers[0] < layers[1]  # type: ignore[index]


class Noisy(Trained):
    """The widths of layers `start` to `end` - 1, and the noise."""

    def __init__(self, noise: LayerNoise, around: Around, start: int, end: int):
        widths = nn.Module()
        c = torch.full((end - start,), math.log(noise.sigma), dtype=around.dtype)
        widths.log_sigma = nn.Parameter(c.to(around.device))
        super().__init__(widths, noise.learning_rate)
        self.layers, self.start, self.seed = around.layers[start:end], start, around.seed

    @property
    def log_sigma(self) -> Tensor:
        """[layers with noise]."""
        return self.module.log_sigma  # type: ignore[return-value]

    def metrics(self) -> dict[str, float]:
        """The widths of the layers: their mean, and the least and the greatest."""
        sigma = self.log_sigma.detach().exp()
        ends = sigma.min().item(), sigma.max().item()
        return {"sigma": sigma.mean().item(), "sigma_min": ends[0], "sigma_max": ends[1]}

    @contextmanager
    def disturbed(self, updates: int) -> Iterator[Hear]:
        """The noise is there; a layer that is computed again in backward is given the same."""
        keys = torch.zeros(0, dtype=torch.int64)  # [R] of the rows of the pass

        def hear(rollouts: Sequence[Rollout]) -> None:
            nonlocal keys
            keys = row_keys([r.id for r in rollouts])

        def add(number: int, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            hidden = args[0] if args else named["hidden_states"]  # [R, S, H]
            salt = f"noise before layer {self.start + number}"
            xi = keyed_normal(self.seed, updates, salt, keys.to(hidden.device), *hidden.shape[1:])
            noise = self.log_sigma[number].exp().to(hidden.device) * xi
            hidden = hidden + noise.to(hidden.dtype)
            return (
                ((hidden, *args[1:]), named) if args else (args, named | {"hidden_states": hidden})
            )

        hooks = [
            layer.register_forward_pre_hook(partial(add, number), with_kwargs=True)
            for number, layer in enumerate(self.layers)
        ]
        try:
            yield hear
        finally:
            for hook in hooks:
                hook.remove()
