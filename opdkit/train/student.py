"""The model that learns: its weights, its optimiser and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.body import head_of
from opdkit.models.precision import compute_in
from opdkit.models.sharding import WholeHead, shard
from opdkit.objective.head import Head
from opdkit.objective.parts import is_part, whole
from opdkit.train.settings import Lora, Optim
from opdkit.types import row_keys

NOISE = ("drop", "jitter")  # in names: attention_dropout, resid_pdrop, router_jitter_noise
ADAPTER_DROPOUT = "lora_dropout"  # modules of peft
ADAPTER_SEED = 0x10A  # adapters start the same whatever was drawn before


@dataclass
class Student:
    """A Hugging Face model with AdamW.

    With `bfloat16` the matrix products are bfloat16 and the weights stay float32; `head_dtype`: of
    the head's product, where it is another.
    """

    model: Any
    optim: Optim
    learning_rate: float  # after warm-up
    # optimiser steps that the run will have taken at its end, as far as is known: see `expect`
    total_updates: float
    bfloat16: bool = False
    vocab: int | None = None  # rows of the head that teacher and student share
    updates: int = 0  # optimiser steps taken
    head_dtype: torch.dtype | None = None
    # its configuration's dropout; that of adapters is `Lora.dropout`
    disable_dropout: bool = True

    def __post_init__(self) -> None:
        compute_in(self.model, torch.bfloat16 if self.bfloat16 else None, self.head_dtype)
        self._optimise()

    def spread(self, devices: Any) -> None:
        """Spreads the model over a mesh of devices, before its first optimiser step; None: nothing
        to do.
        """
        if devices is not None:
            shard(self.model, devices)
            self._optimise()

    def _optimise(self) -> None:
        """An optimiser of the weights that learn, and nothing learnt yet."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [p for p in parameters if p.dim() >= 2]
        plain = [p for p in parameters if p.dim() < 2]  # norms and biases are not decayed
        groups = [
            {"params": decayed, "weight_decay": self.optim.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._whole = WholeHead()
        self.optimiser = torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=self.optim.betas, eps=self.optim.eps, fused=True
        )
        self.parameters = parameters

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def head(self) -> Head:
        """Of a model that is spread over processes it is put together, on all of them at once, and
        kept until the next optimiser step.
        """
        head = head_of(self.model, self.vocab)
        if head.weight is None or not is_part(head.weight):
            return head
        return replace(head, weight=self._whole.of(head.weight, self.updates))

    @contextmanager
    def learning(self, seed: int, rank: int = 0) -> Iterator[None]:
        """Train mode, with dropout, where there is any, keyed by the seed and the optimiser step: a
        resumed run drops the same units. Of several processes, by their ranks, each drops others.
        """
        still = without_noise(self.model) if self.disable_dropout else nullcontext()
        with (
            still,
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
        ):
            own = f" {rank}" if rank else ""
            torch.manual_seed(int(row_keys([f"dropout {seed} {self.updates}{own}"])))
            self.model.train()
            yield

    def expect(
        self,
        now: int,
        step: int,
        total_steps: int,
        passes: Callable[[int], int] = lambda step: 1,
    ) -> None:
        """Lays the schedule out anew: step number `step` (from 0) of `total_steps` takes `now`
        optimiser steps, and those after it as many as a pass took so far for each of theirs;
        `passes`: how often a step goes through its rollouts.
        """
        taken, done = self.updates + now, sum(map(passes, range(step + 1)))
        ahead = sum(map(passes, range(step + 1, total_steps)))
        self.total_updates = taken + ahead * taken / done

    def rate(self, update: int) -> float:
        """Learning rate of the optimiser step number `update`, from 0: linear warm-up, then the
        schedule.
        """
        warm, total = self.optim.warmup_steps, self.total_updates
        if update < warm:
            return self.learning_rate * (update + 1) / warm
        done = min((update - warm) / max(total - warm, 1), 1.0)
        shape = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }
        return self.learning_rate * shape[self.optim.schedule]

    def gradient_norm(self) -> Tensor:
        """[]: norm of all gradients before clipping; clips them to `max_grad_norm`, where there is
        one.
        """
        head = head_of(self.model)
        if is_part(head.weight):
            self._whole.give_back(head.weight)
        # by which gradients are multiplied by 1: the same bits
        limit = self.optim.max_grad_norm or math.inf
        norm: Tensor = whole(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        return norm

    def step(self) -> None:
        """One optimiser step, gradients cleared."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.updates)
        # first: when the next line is interrupted, the weights are no longer those of the step
        # before
        self.updates += 1
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


@contextmanager
def without_noise(model: Any) -> Iterator[None]:
    """A model whose train mode draws nothing but the dropout of its adapters: each share or width
    of noise, of a module or in a configuration that modules read, is 0 meanwhile.

    Train mode itself stays, as recomputing layers in backward depends on it.
    """
    modules = [m for path, m in model.named_modules() if ADAPTER_DROPOUT not in path]
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    before = [(h, name, value) for h in (*modules, *configs.values()) for name, value in _noise(h)]
    try:
        for holder, name, _ in before:
            setattr(holder, name, 0.0)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _noise(holder: Any) -> list[tuple[str, float]]:
    """The names and values of what draws noise in train mode, such as attention_dropout; `p` of
    dropout itself.
    """
    words = (*NOISE, "p") if isinstance(holder, torch.nn.modules.dropout._DropoutNd) else NOISE
    return [
        (name, value)
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0 and any(word in name for word in words)
    ]


def with_adapters(model: Any, lora: Lora) -> Any:
    """The model frozen, with trainable low-rank adapters (peft)."""
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ADAPTER_SEED)
        try:
            return get_peft_model(model, config)
        except ValueError as error:  # no such layers, a rank below 1 ...
            raise UserError(f"lora: {error}") from error
