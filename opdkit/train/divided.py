"""The sampler of several processes: each lets the student write its part of the responses, or the
first asks who writes elsewhere; all have all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from opdkit.models.sharding import is_spread, unsharded
from opdkit.train.mesh import Mesh
from opdkit.types import Elsewhere, Prompt, Rollout, Sampler, Sampling


@dataclass
class DividedSampler:
    """A sampler of which each process asks for the responses to some of the prompts.

    A rollout does not depend on the others in its batch, so that together they are what one process
    would have sampled. A model that is spread over the processes and writes itself is whole on each
    meanwhile; where it has copies, one in each process (`behind`), all of them follow together.
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

        behind = getattr(self.inner, "behind", None)
        copied = behind is not None
        if behind is not None and any(self.mesh.every(bool(behind))):
            self.inner.sync(self.model, settings.get("policy_version", 0))
        with unsharded(self.model) if is_spread(self.model) and not copied else nullcontext():
            of_prompts = self.mesh.divided(prompts, written)
        return [rollout for rollouts in of_prompts for rollout in rollouts]

    def sync(self, model: Any, version: int) -> None:
        self.inner.sync(model, version)


@dataclass
class SharedSampler:
    """A sampler elsewhere, which the first of several processes asks; the weights that it is sent
    are put together by all of them.
    """

    inner: Elsewhere
    mesh: Mesh
    model: Any  # that writes
    sent: bool = False  # whether it has been sent weights

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, **settings: Any
    ) -> list[Rollout]:
        if self.mesh.same(getattr(self.inner, "behind", not self.sent)):
            self.sync(self.model, settings.get("policy_version", 0))
        return self.mesh.first(lambda: self.inner.sample(prompts, sampling, **settings))

    def staged(self, model: Any, version: int) -> Callable[[], None]:
        send, self.sent = self.inner.staged(model, version), True
        return send if self.mesh.rank == 0 else _nothing

    def sync(self, model: Any, version: int) -> None:
        self.staged(model, version)()

    @property
    def metrics(self) -> Any:
        """What is known of who writes, of those who have something to say."""
        return self.inner.metrics  # type: ignore[attr-defined]


def _nothing() -> None:
    """What the processes that ask nobody send."""


def divided(sampler: Any, mesh: Mesh, model: Any) -> Sampler:
    """A sampler that the processes share; as it is where there is one."""
    if mesh.size == 1:
        return sampler
    kind = SharedSampler if hasattr(sampler, "staged") else DividedSampler
    return kind(sampler, mesh, model)


def undivided(sampler: Any) -> Any:
    """What each process of a sampler that they share has of it."""
    return sampler.inner if isinstance(sampler, (DividedSampler, SharedSampler)) else sampler
