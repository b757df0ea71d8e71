"""Facts from models in this process: one chunked pass over their sources supplies all that an
objective reads of them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from opdkit.objective.batch import Batch, Live
from opdkit.objective.facts import Fact
from opdkit.objective.head import chunk_rows as default_rows
from opdkit.objective.head import slices

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
    where = torch.zeros_like(batch.trained).flatten().index_fill(0, positions, True)
    where = where.view(batch.shape)
    todo = [f for f in with_ids(wanted) if f not in batch.facts]
    todo = [f for f in todo if still_asked(batch, f) <= set(sources)]
    found: Tensors = {f: sources[f.models[0]].read(f, where) for f in todo if f.read_from == "step"}
    # ids before log-probs there
    todo = sorted(
        (f for f in todo if f.read_from == "chunk"),
        key=lambda f: (f.dtype != torch.int64, f.words()),
    )
    if not todo:
        return found
    used = {m for f in todo for m in f.models if m in sources}
    size = chunk or default_rows(max(sources[m].vocabulary for m in used), batch.device)
    parts: dict[Fact, list[Tensor]] = {f: [] for f in todo}
    with torch.no_grad():
        for at in list(slices(len(positions), size)) or [slice(0, 0)]:
            here = Live(batch, positions[at], torch.empty(0))
            made: Tensors = {}
            for fact in todo:
                ids = {f: made[f] if f in made else here.read(f) for f in fact.needs_first}
                made[fact] = fact.read(here, ids)
                parts[fact].append(made[fact])
    return found | {f: _scatter(batch, positions, parts[f]) for f in todo}


def with_ids(wanted: Collection[Fact]) -> set[Fact]:
    """Facts, and the token ids at which they are read."""
    return {*wanted, *(ids for fact in wanted for ids in fact.needs_first)}


def still_asked(batch: Batch, fact: Fact) -> set[str]:
    """The models that a fact is asked of: not one whose ids, its part in it, are there already."""
    named = {ids.model for ids in fact.others_first if ids in batch.facts}
    return set(fact.models) - named


def _scatter(batch: Batch, positions: Tensor, parts: list[Tensor]) -> Tensor:
    """[B, T] or [B, T, k]: the chunks' values [n] or [n, k] at flat positions [N], zero
    elsewhere.
    """
    values = torch.cat(parts)
    full = torch.zeros(
        (batch.tokens.numel(), *values.shape[1:]), dtype=values.dtype, device=values.device
    )
    full[positions] = values
    return full.view(*batch.shape, *values.shape[1:])
