"""Copies of the student: a moving average of its weights, a hard copy now and then, what it was a
step ago, what it is from some step on.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.objective.companion import Around, Companion, CompanionState, Stepped
from opdkit.objective.parts import like


class CopyOfStudent(Companion):
    """A copy of the student, read as the model `model`; it starts as the student does."""

    def build(self, around: Around) -> CompanionState:
        if around.model is None or around.scorer is None:
            raise UserError(
                f"{self} is a copy of a model, and a formula on plain logits has none: bring it "
                f"with the method, Method(objective, companions=({self},)), and read it as the "
                f"model {self.model!r}; evaluate takes its logits in models={{{self.model!r}: ...}}"
            )
        return self.copied(around)

    @abstractmethod
    def copied(self, around: Around) -> StudentCopy:
        """The copy, where there is a student to copy."""


@dataclass(frozen=True)
class Ema(CopyOfStudent):
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

    def copied(self, around: Around) -> StudentCopy:
        return EmaCopy(self, around)


@dataclass(frozen=True)
class Snapshot(CopyOfStudent):
    """The student as it begins, and from step number `at` of the run (from 0) on as it is at the
    start of that step: an anchor that is moved once. At 0 it stays as it began.
    """

    at: int = 0
    model: str = "reference"

    def copied(self, around: Around) -> StudentCopy:
        return SnapshotCopy(self, around)


@dataclass(frozen=True)
class Previous(CopyOfStudent):
    """The student as it was at the start of the run's step before this one; in the first step as it
    is.
    """

    model: str = "previous"

    @property
    def copies(self) -> int:
        return 2

    def copied(self, around: Around) -> StudentCopy:
        return PreviousCopy(around)


class StudentCopy(CompanionState):
    """A copy: what learns of the student is copied, frozen weights below adapters are shared."""

    def __init__(self, around: Around):
        assert around.scorer is not None
        shared = {id(p): p for p in around.model.parameters() if not p.requires_grad}
        self.model = around.placed(copy.deepcopy(around.model, shared).eval())
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.model.requires_grad_(False)
        self.source = around.scorer(self.model).source

    def state_dict(self) -> Mapping[str, Any]:
        return detached(self.weights)

    def load_state_dict(self, state: Any) -> None:
        follow(self.weights, state, 1.0)


class EmaCopy(StudentCopy):
    """The copy of an `Ema`."""

    def __init__(self, ema: Ema, around: Around):
        super().__init__(around)
        self.ema = ema

    def after_step(self, stepped: Stepped) -> None:
        if stepped.updates % self.ema.every:
            return
        first = self.ema.first_copy and stepped.updates == self.ema.every
        follow(self.weights, learning(stepped.model), 1.0 if first else self.ema.rate)


class SnapshotCopy(StudentCopy):
    """The copy of a `Snapshot`: of the last optimiser step before its own, as that is the last to
    write it.
    """

    def __init__(self, snapshot: Snapshot, around: Around):
        super().__init__(around)
        self.at = snapshot.at

    def after_step(self, stepped: Stepped) -> None:
        if stepped.batch.step == self.at - 1:
            follow(self.weights, learning(stepped.model), 1.0)


class PreviousCopy(StudentCopy):
    """Two copies: the student after the last optimiser step, and, of which the model is made, what
    that was when the run's step began.
    """

    def __init__(self, around: Around):
        super().__init__(around)
        self.now = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.step = -1  # of the last optimiser step

    def after_step(self, stepped: Stepped) -> None:
        if stepped.batch.step != self.step:  # the first of a step: it began with what is held
            self.step = stepped.batch.step
            follow(self.weights, self.now, 1.0)
        follow(self.now, learning(stepped.model), 1.0)

    def state_dict(self) -> Mapping[str, Any]:
        return {"step": self.step, "before": dict(super().state_dict()), "now": dict(self.now)}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state["before"])
        follow(self.now, state["now"], 1.0)
        self.step = state["step"]


def detached(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any shape [...] by name, as numbers alone."""
    return {name: weight.detach() for name, weight in weights.items()}


def learning(model: Any) -> dict[str, Tensor]:
    """The weights that learn, of any shape [...], by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def follow(weights: Mapping[str, Tensor], others: Mapping[str, Tensor], rate: float) -> None:
    """Moves each of some weights [...] by a share of the way to the other of its name, in place; at
    1 it becomes that, to the bit.
    """
    if set(others) != set(weights):
        raise ValueError("its weights have other names than the student's")
    for name, weight in weights.items():
        other = like(weight, others[name])
        if rate == 1:
            weight.copy_(other)
        else:
            weight.lerp_(other, rate)
