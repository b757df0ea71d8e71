"""Models in this process: one, or several by route. They hand over hidden states, never logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opdkit.errors import UserError, nearest
from opdkit.forward import Layout, batch_tokens
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
    micro_batch_tokens: int | None = None  # padded tokens of one pass; None: `forward.batch_tokens`
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def source(self, layout: Layout, positions: Tensor) -> Source:
        """Hidden states at flat positions [N]; the model's mode, gradients and random state are left as they were."""
        parts = layout.micro_batches(positions, self.micro_batch_tokens or batch_tokens(positions.device))
        with evaluating(self.model), torch.no_grad(), self.around():
            hidden = [layout.states(self.model, part) for part in parts]
        for part, states in zip(parts, hidden):
            self._refuse_broken(layout, part, states)
        index = torch.full((len(layout.rollouts) * layout.width,), -1, dtype=torch.int64, device=positions.device)
        if not parts:
            weight = self.head.weight
            return Source(torch.zeros(0, 0 if weight is None else weight.shape[1], device=positions.device), index, self.head)
        index[torch.cat(parts)] = torch.arange(len(positions), device=positions.device)
        return Source(torch.cat(hidden), index, self.head)

    def _refuse_broken(self, layout: Layout, positions: Tensor, states: Tensor) -> None:
        """Hidden states that are not numbers would spread into every weight of the student."""
        bad = ~states.isfinite().all(-1)
        if bool(bad.any()):
            row = int(positions[bad.to(positions.device)].min()) // layout.width  # attention spreads it over the whole row
            raise UserError(
                f"{self.model.config._name_or_path or type(self.model).__name__} gives hidden states that are not finite for rollout "
                f"{layout.rollouts[row].id}: its files are damaged, or its dtype is too narrow. Nothing was learnt from this step; "
                "check the model, or load it in float32"
            )


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
        order = which.argsort(stable=True)
        parts = [source.logits(positions[which == i]) for i, source in enumerate(self.sources)]
        kept = [part for part in parts if len(part)] or parts[:1]
        logits = torch.cat(kept)
        return torch.empty_like(logits).index_copy_(0, order, logits)


def route(name: str | None, known: Collection[str], who: str) -> str:
    """The key of the teacher that serves a row, or rollout, called `who`."""
    if name in known:
        return str(name)
    if "default" in known:
        return "default"
    said = "names no teacher" if name is None else f"names the teacher {name!r}{nearest(name, list(known))}"
    raise UserError(
        f"{who} {said}. The run has teachers for {', '.join(known)}, and none would score it: add that teacher to the run "
        "(teacher.NAME=MODEL), or one called 'default'"
    )


@dataclass(frozen=True)
class Routed:
    """Several teachers; a row is scored by the one that its `teacher` column names. "default" serves rows that name none."""

    teachers: Mapping[str, LocalModel]

    def source(self, layout: Layout, positions: Tensor) -> RoutedSource:
        keys = list(self.teachers)
        routes = [keys.index(route(r.row.get("teacher"), keys, f"rollout {r.id}")) for r in layout.rollouts]
        which = torch.tensor(routes, device=positions.device).repeat_interleave(layout.width)
        sources = [self.teachers[key].source(layout, positions[which[positions] == i]) for i, key in enumerate(keys)]
        return RoutedSource(sources, which)
