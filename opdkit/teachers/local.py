"""Models in this process: one, or several by route. They hand over hidden states, never logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opdkit.errors import UserError, nearest
from opdkit.forward import Layout
from opdkit.head import Head, Source
from opdkit.models import evaluating


class Scorer(Protocol):
    """Anything that can say what a model thinks of the rollouts' tokens."""

    def source(self, layout: Layout, positions: Tensor) -> Any:
        """A `head.Source` (or one that answers like it) at flat positions [N]."""
        ...


@dataclass(frozen=True)
class LocalModel:
    """A frozen Hugging Face model: a teacher, a reference, or the student as it is now.

    `around` is a context for its passes, such as one that switches the student's adapters off.
    """

    model: Any
    head: Head
    micro_batch_tokens: int = 65536
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def source(self, layout: Layout, positions: Tensor) -> Source:
        """Hidden states at flat positions [N]; the model's mode, gradients and random state are left as they were."""
        parts = layout.micro_batches(positions, self.micro_batch_tokens)
        with evaluating(self.model), torch.no_grad(), self.around():
            hidden = [layout.states(self.model, part) for part in parts]
        index = torch.full((len(layout.rollouts) * layout.width,), -1, dtype=torch.int64, device=positions.device)
        if not parts:
            weight = self.head.weight
            return Source(torch.zeros(0, 0 if weight is None else weight.shape[1], device=positions.device), index, self.head)
        index[torch.cat(parts)] = torch.arange(len(positions), device=positions.device)
        return Source(torch.cat(hidden), index, self.head)


@dataclass(frozen=True)
class RoutedSource:
    """Several sources, each at its own positions."""

    sources: Sequence[Source]
    which: Tensor  # [B * T] index of the source

    @property
    def vocabulary(self) -> int:
        return max(source.vocabulary for source in self.sources)

    def logits(self, positions: Tensor) -> Tensor:
        """[n, V] at flat positions [n]."""
        which = self.which[positions]
        out = torch.empty(len(positions), self.vocabulary, device=positions.device)
        for i, source in enumerate(self.sources):
            mine = (which == i).nonzero()[:, 0]
            if len(mine):
                out[mine] = source.logits(positions[mine]).to(out.dtype)
        return out


@dataclass(frozen=True)
class Routed:
    """Several teachers; a row is scored by the one that its `teacher` column names. "default" serves rows that name none."""

    teachers: Mapping[str, LocalModel]

    def route(self, name: str | None, rollout: str) -> str:
        """The key of the teacher that serves a row."""
        if name in self.teachers:
            return str(name)
        if "default" in self.teachers:
            return "default"
        said = "names no teacher" if name is None else f"names the teacher {name!r}"
        raise UserError(
            f"rollout {rollout} {said}, and the run has {', '.join(self.teachers)}{nearest(str(name), list(self.teachers))}. "
            "Add that teacher to the run, or one called 'default'"
        )

    def source(self, layout: Layout, positions: Tensor) -> RoutedSource:
        keys = list(self.teachers)
        routes = [keys.index(self.route(r.row.get("teacher"), r.id)) for r in layout.rollouts]
        which = torch.tensor(routes, device=positions.device).repeat_interleave(layout.width)
        sources = [self.teachers[key].source(layout, positions[which[positions] == i]) for i, key in enumerate(keys)]
        return RoutedSource(sources, which)
