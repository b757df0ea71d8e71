"""Settings of the trainer itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opdkit.base.rules import Rules, at_least, follow
from opdkit.models.quantize import check_quantize

SCHEDULES = ("constant", "linear", "cosine")

# With other numbers a run goes on, step by step, and learns nothing, or goes uphill.
LORA: Rules = {
    "r": at_least(1, "it is the rank of the adapters, and without one nothing is learnt"),
    "alpha": at_least(
        1, "adapters are scaled by alpha / r; at 0 they get no gradient, and nothing is learnt"
    ),
    "dropout": (
        lambda d: 0 <= d < 1,
        "in [0, 1)",
        "it is the share of an adapter's inputs that are dropped; at 1 nothing is learnt",
    ),
}
OPTIM: Rules = {
    "schedule": (
        lambda schedule: schedule in SCHEDULES,
        f"one of {', '.join(SCHEDULES)}",
        "it is the shape of the learning rate after warm-up",
    ),
    "learning_rate": (
        lambda rate: rate is None or 0 < rate < math.inf,
        "positive and finite, or null for the usual one",
        "at 0 nothing is learnt, and below it every step goes uphill, away from what the method "
        "teaches",
    ),
    "warmup_steps": at_least(
        0, "it is the number of optimiser steps over which the learning rate rises"
    ),
    "passes": at_least(
        1, "it is how often a step's rollouts are gone through, and without one nothing is learnt"
    ),
    "minibatches": at_least(
        1, "it is the number of optimiser steps of a pass, and without one nothing is learnt"
    ),
    "weight_decay": (
        lambda decay: 0 <= decay < math.inf,
        "at least 0 and finite",
        "every step shrinks the weights by the share learning_rate * weight_decay, and a negative "
        "one makes them grow without end",
    ),
    "betas": (
        lambda betas: all(0 <= beta < 1 for beta in betas),
        "two numbers in [0, 1)",
        "each is the share of AdamW's running mean that a step keeps; at 1 no gradient ever enters "
        "it, and nothing is learnt",
    ),
    "eps": (
        lambda eps: 0 < eps < math.inf,
        "positive and finite",
        "AdamW divides by sqrt(v) + eps: at 0 a weight without gradient becomes 0/0, and below it "
        "a step can turn round",
    ),
    "max_grad_norm": (
        lambda norm: norm is None or 0 <= norm < math.inf,
        "positive and finite, or null (or 0) for no clipping",
        "long gradients are multiplied by max_grad_norm / norm, and a negative one turns every "
        "such step uphill",
    ),
}
CHECKPOINT: Rules = {
    "every": at_least(
        0, "it is the number of steps between two checkpoints; 0 saves only at the end"
    ),
    "keep": at_least(
        1,
        "it is how many of the newest checkpoints stay, and a run is resumed from the newest one",
    ),
}


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters instead of full weights."""

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    quantize: str | None = None  # 8bit or 4bit: how the frozen weights are stored (QLoRA)

    def __post_init__(self) -> None:
        check_quantize(self.quantize)
        follow(LORA, self)


@dataclass(frozen=True)
class Optim:
    """AdamW and what surrounds it."""

    learning_rate: float | None = None  # null: 1e-6 for full weights, 1e-4 with LoRA
    schedule: str = "constant"  # after warm-up: constant, or linear or cosine to zero
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0  # longer gradients are shortened to it; null or 0: none is
    passes: int = 1  # times a rollout batch is gone through
    # optimiser steps per pass; fewer where a step has fewer groups, which are not divided
    minibatches: int = 1

    def __post_init__(self) -> None:
        follow(OPTIM, self)


@dataclass(frozen=True)
class Checkpoint:
    """When the run is saved. The last and the best are kept."""

    every: int = 50  # steps; 0: only at the end
    keep: int = 1  # newest ones kept besides the best
    # several processes write theirs while the run goes on; false: it waits until all is written
    background: bool = True

    def __post_init__(self) -> None:
        follow(CHECKPOINT, self)
