"""Policies that act instead of speak: a distribution over the last ids of the vocabulary alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Actions:
    """A policy over bins of an action: the last `bins` ids of the vocabulary that all models of a
    run share, logits divided by `temperature`; every other id has probability exactly 0.

    A method that has it, `Method(objective, actions=Actions(256))`, has every head of its run
    restricted so: of the student that learns and samples, and of all models that are read. Facts,
    losses, samples and evaluations then see bins only, and the same temperature on all sides.
    """

    bins: int = 256
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(
                f"bins={self.bins} must be at least 2: with one there is nothing to choose"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0: it divides the logits of all "
                "models"
            )

    def first(self, vocabulary: int) -> int:
        """The id of the first bin in a vocabulary of so many ids."""
        if self.bins > vocabulary:
            raise ValueError(
                f"bins={self.bins} are more ids than the vocabulary has, {vocabulary}: the last "
                "ones of it stand for the bins of an action"
            )
        return vocabulary - self.bins

    def spread(self, logits: Tensor, first: int) -> Tensor:
        """[n, V]: logits [n, bins] over the temperature, behind `first` ids that are never
        written.
        """
        return pad(logits / self.temperature, (first, 0), value=float("-inf"))
