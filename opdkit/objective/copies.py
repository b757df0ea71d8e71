"""Copies of the student that follow it: a moving average of its weights, or a hard copy now and
then.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from opdkit.base.errors import UserError
from opdkit.objective.companion import Around, Companion, CompanionState, Stepped
from opdkit.objective.parts import like, whole


@dataclass(frozen=True)
class Ema(Companion):
    """A copy of the student, read as the model `model`, that starts as the student does.

    After every `every`-th optimiser step it moves by `rate` of the way to the student: copy +=
    rate (student - copy). With rate 1 it becomes the student (a synchronised, hard copy), with rate
    0 it stays as it began. With `first_copy` its first move is all of the way, whatever the rate.
    """

    rate: float = 0.01
    every: int = 1
    model: str = "ema"
    first_copy: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(
                f"rate={self.rate} must lie between 0 (the copy stays as it began) and 1 (it "
                "becomes the student): it is the share of the way that the copy moves"
            )
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1, in optimiser steps")
        if not self.model:
            raise ValueError("model='' says no name under which the copy can be read")

    def build(self, around: Around) -> CompanionState:
        if around.model is None or around.scorer is None:
            raise UserError(
                f"{self} is a copy of a model, and a formula on plain logits has none: bring it "
                f"with the method, Method(objective, companions=({self},)), and read it as the "
                f"model {self.model!r}; evaluate takes its logits in models={{{self.model!r}: ...}}"
            )
        return StudentCopy(self, around)


class StudentCopy(CompanionState):
    """The copy: what learns of the student is copied, frozen weights below adapters are shared."""

    def __init__(self, ema: Ema, around: Around):
        assert around.scorer is not None
        self.ema = ema
        shared = {id(p): p for p in around.model.parameters() if not p.requires_grad}
        self.model = around.placed(copy.deepcopy(around.model, shared).eval())
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.model.requires_grad_(False)
        self.source = around.scorer(self.model).source

    @torch.no_grad()
    def after_step(self, stepped: Stepped) -> None:
        if stepped.updates % self.ema.every:
            return
        first = self.ema.first_copy and stepped.updates == self.ema.every
        student = dict(stepped.model.named_parameters())
        for name, weight in self.weights.items():
            weight.lerp_(student[name], 1.0 if first else self.ema.rate)

    def state_dict(self) -> Mapping[str, Any]:
        return {name: whole(weight.detach()) for name, weight in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        if set(state) != set(self.weights):
            raise ValueError("its weights have other names than the student's")
        for name, weight in self.weights.items():
            weight.copy_(like(weight, state[name]))
