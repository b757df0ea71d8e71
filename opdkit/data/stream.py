"""In which order prompts are asked: shuffled anew each epoch, resumable from three numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from opdkit.base import splitmix
from opdkit.base.errors import UserError


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """[size] int64: the order of an epoch, the same on every machine and with every version of
    NumPy.
    """
    mix, key = splitmix.mix, np.array([splitmix.wrapped(seed)], dtype=np.int64)
    for word in (epoch, size):
        key = mix(key + splitmix.wrapped((word + 1) * splitmix.STEP))
    ranks = mix(mix(np.arange(size, dtype=np.int64) + key) ^ key)
    return np.argsort(ranks.view(np.uint64), kind="stable")


class PromptStream:
    """Indices of prompts, each once per epoch. Endless, or ends after `epochs`.

    All that it remembers is (seed, epoch, position): `load(state())` on another stream continues
    exactly.
    """

    def __init__(self, size: int, *, seed: int = 0, epochs: int | None = None):
        if size < 1:
            raise UserError(
                "there are no prompts to draw from: check the data set's path, split and filters"
            )
        if epochs is not None and epochs < 1:
            raise UserError(
                f"epochs={epochs} asks for no prompt at all: use 1 or more, or None for no end"
            )
        self.size, self.seed, self.epochs = size, seed, epochs
        self.epoch = self.position = 0  # position: prompts of this epoch already taken
        self._order = permutation(size, seed, 0)

    @property
    def taken(self) -> int:
        """Prompts taken since the start."""
        return self.epoch * self.size + self.position

    def take(self, n: int) -> list[int]:
        """The next n indices, over the end of an epoch where need be; fewer once the last epoch
        ends, then none.
        """
        out: list[int] = []
        while len(out) < n and not (self.epochs is not None and self.epoch >= self.epochs):
            part = self._order[self.position : self.position + n - len(out)]
            out += part.tolist()
            self.position += len(part)
            if self.position == self.size:
                self._start(self.epoch + 1)
        return out

    def _start(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self._order = permutation(self.size, self.seed, epoch)

    def state(self) -> dict[str, int]:
        """What a checkpoint holds."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "size": self.size,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        if state["size"] != self.size:
            raise UserError(
                f"the checkpoint was written with {state['size']} prompts, and there are "
                f"{self.size} now: the order would change, so some would be asked twice and some "
                "never. Use the same data, or start a new run from the saved model."
            )
        self.seed = state["seed"]
        self._start(state["epoch"])
        self.position = state["position"]
