"""Responses that the student wrote at earlier steps, drawn from those that are remembered."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opdkit.base.errors import UserError
from opdkit.curricula.recall import again
from opdkit.curricula.writer import StepContext, Writer
from opdkit.objective.maths import keyed_uniform
from opdkit.types import Rollout


@dataclass(frozen=True)
class StoreWriter(Writer):
    """As many different responses as a step has, drawn at random from memory["store"], which holds
    the last `capacity` of them as dicts. Their prompts are not those of the step.
    """

    capacity: int

    def write(self, context: StepContext) -> list[Rollout]:
        store = context.memory.get("store", [])
        count = len(context.prompts) * context.sampling.num_generations
        if count > len(store):
            raise UserError(
                f"a batch of {count} responses cannot be drawn from a store of {len(store)}: "
                f"set capacity (now {self.capacity}) to at least the responses of one step"
            )
        keys = torch.arange(len(store))
        draws = keyed_uniform(context.seed, context.step, "replay", keys, 1, torch.float64)
        return [again(store[i]) for i in draws[:, 0].argsort()[:count].tolist()]
