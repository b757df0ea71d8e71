"""How a scorer answers: with a whole vocabulary, or, where the model is elsewhere, with the numbers
it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from opdkit.models.layout import Layout
from opdkit.objective.batch import Batch
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.head import Head, Source
from opdkit.objective.supply import Tensors, supply
from opdkit.types import DataRow, Rollout

T = TypeVar("T")


class Scorer(Protocol):
    """A model whose whole vocabulary can be read here."""

    def source(self, layout: Layout, positions: Tensor) -> Any:
        """A `head.Source` (or one that answers like it) at flat positions [N]."""
        ...


@runtime_checkable
class Remote(Protocol):
    """A model elsewhere (a server, another engine, a file): it answers with numbers.

    One that has a `source` too is asked for it where an objective reads the whole vocabulary.
    """

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N].

        `ids` [N, k] are other models' most probable tokens, where it reads those.
        """
        ...


def source_of(
    head: Head, layout: Layout, parts: Sequence[Tensor], hidden: Sequence[Tensor], device: Any
) -> Source:
    """One source of what was computed part by part.

    Arguments:
        parts: flat positions [n] of each part.
        hidden: hidden states [n, H] at them.
        device: of the source.
    """
    index = torch.full((len(layout.rollouts) * layout.width,), -1, device=device)
    if not parts:
        width = 0 if head.weight is None else head.weight.shape[1]
        return Source(torch.zeros(0, width, device=device), index, head)
    at = torch.cat(list(parts)).to(device)
    index[at] = torch.arange(len(at), device=device)
    return Source(torch.cat(list(hidden)).to(device), index, head)


def in_order(parts: Sequence[Tensor], index: Sequence[Tensor], device: Any) -> Tensor:
    """[N] or [N, k]: values [n] or [n, k] of each part, at the places `index` [n] that it has among
    all N.
    """
    values = torch.cat(list(parts))
    return torch.empty_like(values).index_copy_(0, torch.cat(list(index)), values).to(device)


def early(scorer: Any, rollout: Rollout) -> bool:
    """Whether requests about a rollout can be begun as it ends, whatever becomes of it and of the
    others: as the scorer itself says.
    """
    return hasattr(scorer, "early") and bool(scorer.early(rollout))


def elsewhere(scorer: Any) -> bool:
    """Whether a scorer computes nothing here, so that it can be asked from another thread."""
    return bool(getattr(scorer, "elsewhere", False))


def side_by_side(scorers: Iterable[Any], calls: Iterable[Callable[[], T]]) -> list[T]:
    """The result of each scorer's call, in order: those elsewhere are asked together, while those
    in this process compute.
    """
    with ThreadPoolExecutor(64, thread_name_prefix="teacher") as threads:
        given: list[Future[T] | Callable[[], T]] = [
            threads.submit(copy_context().run, call) if elsewhere(scorer) else call
            for scorer, call in zip(scorers, calls)
        ]
        here = [one() if callable(one) else None for one in given]
        return [
            one.result() if isinstance(one, Future) else found  # type: ignore[misc]
            for one, found in zip(given, here)
        ]


def heads_of(scorer: Any) -> Sequence[Head]:
    """The heads that a scorer's distributions come from in this process; none for numbers from
    elsewhere.
    """
    return getattr(scorer, "heads", ())


def reads_of(scorer: Any) -> int | None:
    """Tokens, in the student's own ids, that a scorer reads at most; None where it has no limit, or
    says so itself when it is asked.
    """
    limit: int | None = getattr(scorer, "reads", None)
    return limit


def least_reads(scorers: Iterable[Any]) -> int | None:
    """The shortest of several."""
    return min((n for n in map(reads_of, scorers) if n is not None), default=None)


# a row, the tokens of its prompt as a scorer reads it, and how many that scorer reads at most
Longest = tuple[str, int, int | None]


def longest_of(scorer: Any, rows: Sequence[DataRow]) -> Longest:
    """The prompt of one of the rows that leaves the least room, of a scorer with a view."""
    found: Longest = scorer.longest(rows) if hasattr(scorer, "longest") else ("", 0, None)
    return found


def tightest(found: Iterable[Longest]) -> Longest:
    """The one that leaves the least room."""
    bounded = [(row, length, limit) for row, length, limit in found if limit is not None]
    return max(bounded, key=lambda one: one[1] - one[2], default=("", 0, None))


def cut(scorer: Any, vocab: int | None) -> Any:
    """A scorer whose heads keep only the first rows."""
    return scorer.cut(vocab) if hasattr(scorer, "cut") else scorer


def answers(
    scorer: Scorer | Remote,
    wanted: Collection[Fact],
    layout: Layout,
    positions: Tensor,
    ids: Mapping[TopFact, Tensor],
) -> Tensors:
    """The wanted facts of one model [N] or [N, k], whichever way its scorer answers."""
    if isinstance(scorer, Remote):
        return scorer.facts(wanted, layout, positions, ids)
    tokens = torch.tensor(
        [r.tokens + [0] * (layout.width - len(r.tokens)) for r in layout.rollouts],
        device=positions.device,
    )
    batch = Batch(
        tokens.view(len(layout.rollouts), layout.width), torch.ones_like(tokens, dtype=torch.bool)
    )
    for fact, top in ids.items():
        batch.facts[fact] = scattered(top, positions, batch)
    (model,) = {fact.models[0] for fact in wanted}
    batch.sources[model] = scorer.source(layout, positions)
    return {
        fact: values.flatten(0, 1)[positions]
        for fact, values in supply(batch, wanted, positions).items()
    }


def scattered(values: Tensor, positions: Tensor, batch: Batch) -> Tensor:
    """[B, T] or [B, T, k]: values [N] or [N, k] at flat positions, zero elsewhere."""
    full = torch.zeros(
        (batch.tokens.numel(), *values.shape[1:]), dtype=values.dtype, device=batch.device
    )
    full[positions] = values.to(batch.device)
    return full.view(*batch.shape, *values.shape[1:])
