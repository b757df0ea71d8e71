"""The sampler of several processes: each lets the student write its part of the responses, and all
have all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from opdkit.models.sharding import is_spread, unsharded
from opdkit.train.mesh import Mesh
from opdkit.types import Prompt, Rollout, Sampler, Sampling


@dataclass
class DividedSampler:
    """A sampler of which each process asks for the responses to some of the prompts.

    A rollout does not depend on the others in its batch, so that together they are what one process
    would have sampled. A model that is spread over the processes is whole on each meanwhile.
    """

    inner: Sampler
    mesh: Mesh
    model: Any  # that writes

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, **settings: Any
    ) -> list[Rollout]:
        def written(mine: Sequence[Prompt]) -> list[list[Rollout]]:
            each = sampling.num_generations
            made = self.inner.sample(mine, sampling, **settings)
            return [made[i : i + each] for i in range(0, len(made), each)]

        with unsharded(self.model) if is_spread(self.model) else nullcontext():
            of_prompts = self.mesh.divided(prompts, written)
        return [rollout for rollouts in of_prompts for rollout in rollouts]

    def sync(self, model: Any, version: int) -> None:
        self.inner.sync(model, version)


def divided(sampler: Sampler, mesh: Mesh, model: Any) -> Sampler:
    """A sampler that the processes share; as it is where there is one."""
    return sampler if mesh.size == 1 else DividedSampler(sampler, mesh, model)
