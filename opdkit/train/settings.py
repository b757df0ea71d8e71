"""Settings of the trainer itself."""

from __future__ import annotations

from dataclasses import dataclass

from opdkit.quantize import check_quantize

SCHEDULES = ("constant", "linear", "cosine")


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


@dataclass(frozen=True)
class Optim:
    """AdamW and what surrounds it."""

    learning_rate: float | None = None  # null: 1e-6 for full weights, 1e-4 with LoRA
    schedule: str = "constant"  # after warm-up: constant, or linear or cosine to zero
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    passes: int = 1  # times a rollout batch is gone through
    minibatches: int = 1  # optimiser steps per pass

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        if self.passes < 1 or self.minibatches < 1:
            raise ValueError("passes and minibatches must be at least 1")


@dataclass(frozen=True)
class Checkpoint:
    """When the run is saved. The last and the best are kept."""

    every: int = 50  # steps; 0: only at the end
    keep: int = 1  # newest ones kept besides the best
