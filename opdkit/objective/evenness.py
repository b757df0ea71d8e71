"""How undecided a model is, whatever the size of its vocabulary: its entropy over the largest that
it could have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.objective.batch import Batch
from opdkit.objective.facts import Chunk, Fact, TopFact
from opdkit.objective.formula import Signal


@dataclass(frozen=True)
class EvennessFact(Fact):
    """[B, T] in [0, 1]: the entropy of a model over that of a uniform choice, log V."""

    model: str

    def words(self) -> str:
        return f"{self.model} entropy over log V"

    def read(self, here: Chunk, first: Mapping[TopFact, Tensor]) -> Tensor:  # [n]
        vocabulary = here.vocabulary(self.model)
        most = math.log(max(vocabulary.logits.shape[-1], 2))
        return vocabulary.statistics()[1].clamp_min(0) / most

    def made_up(self, rows: int, length: int, vocabulary: int) -> Tensor:  # [B, T]
        return torch.ones(rows, length)


@dataclass(frozen=True)
class Evenness(Signal):
    """[B, T] in [0, 1]: see `EvennessFact`."""

    model: str = "student"

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        return batch.read(EvennessFact(self.model))
