"""Facts from models in this process: one chunked pass over their sources supplies all that an
objective reads of them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from opdkit.objective import kernels
from opdkit.objective.batch import Batch, Live
from opdkit.objective.facts import (
    ColumnFact,
    EntropyFact,
    Fact,
    GapFact,
    LogpAtFact,
    LogpFact,
    SpanFact,
    TopFact,
    VocabularyFact,
)
from opdkit.objective.head import chunk_rows as default_rows
from opdkit.objective.head import slices
from opdkit.objective.needs import describe, models_of

Tensors = dict[Fact, Tensor]


# ------------------------------------------------------------------------------------------- supply


def supply(
    batch: Batch, wanted: Collection[Fact], positions: Tensor, chunk: int | None = None
) -> Tensors:
    """The wanted facts whose models are in `batch.sources`, at flat positions [N], scattered to [B,
    T] or [B, T, k].

    One pass: a chunk's logits of each model are made once and everything is read off them.
    Elsewhere the facts are zero. Facts of which the batch already holds the tensor (a server's
    top-k, the sampler's log-probs) are left alone.
    """
    sources = batch.sources
    wanted = set(wanted) | {TopFact(f.owner, f.k) for f in wanted if isinstance(f, LogpAtFact)}
    todo = [
        f
        for f in wanted
        if not isinstance(f, (ColumnFact, VocabularyFact)) and f not in batch.facts
    ]
    todo = [f for f in todo if all(m in sources or _held(batch, f, m) for m in models_of(f))]
    spans = [f for f in todo if isinstance(f, SpanFact)]
    aligned: Tensors = {
        f: sources[f.model].read(f, batch.mask) for f in spans if f.what != "vocabulary"
    }
    todo = sorted(
        (f for f in todo if f not in spans), key=lambda f: (not isinstance(f, TopFact), describe(f))
    )  # ids before log-probs there
    if not todo:
        return aligned
    used = {m for f in todo for m in models_of(f) if m in sources}
    size = chunk or default_rows(max(sources[m].vocabulary for m in used), batch.device)
    parts: dict[Fact, list[Tensor]] = {f: [] for f in todo}
    with torch.no_grad():
        for at in list(slices(len(positions), size)) or [slice(0, 0)]:
            here = Live(batch, positions[at], torch.empty(0))
            made: Tensors = {}
            for fact in todo:
                made[fact] = _read(fact, here, made)
                parts[fact].append(made[fact])
    return aligned | {f: _scatter(batch, positions, parts[f]) for f in todo}


def _held(batch: Batch, fact: Fact, model: str) -> bool:
    """Whether the ids at which another model is to be read have been supplied from elsewhere."""
    return (
        isinstance(fact, LogpAtFact)
        and model == fact.owner != fact.model
        and TopFact(model, fact.k) in batch.facts
    )


def _read(fact: Fact, here: Live, made: Tensors) -> Tensor:
    """One fact at one chunk of positions."""
    if isinstance(fact, LogpFact):
        return here.vocabulary(fact.model).at(here.tokens[:, None])[:, 0]
    if isinstance(fact, EntropyFact):
        return here.vocabulary(fact.model).statistics()[1]
    if isinstance(fact, TopFact):
        logits = here.vocabulary(fact.model).logits
        return logits.topk(min(fact.k, logits.shape[-1]), -1).indices
    if isinstance(fact, LogpAtFact):
        ids = (
            made[TopFact(fact.owner, fact.k)]
            if TopFact(fact.owner, fact.k) in made
            else here.read(TopFact(fact.owner, fact.k))
        )
        return here.vocabulary(fact.model).at(ids)
    if isinstance(fact, GapFact):
        student, teacher = here.vocabulary(fact.student), here.vocabulary(fact.teacher)
        return kernels.divergence(fact.kind, student, teacher, fact.temperature)  # type: ignore[arg-type]
    raise TypeError(f"{fact} is not read off a vocabulary")


def _scatter(batch: Batch, positions: Tensor, parts: list[Tensor]) -> Tensor:
    values = torch.cat(parts)
    full = torch.zeros(
        (batch.tokens.numel(), *values.shape[1:]), dtype=values.dtype, device=values.device
    )
    full[positions] = values
    return full.view(*batch.shape, *values.shape[1:])
