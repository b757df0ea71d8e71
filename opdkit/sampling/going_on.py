"""Rows go on after a turn: what others write is fed into their own caches, so that no history is
read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opdkit.models.body import hidden_states
from opdkit.models.load import CausalLM
from opdkit.sampling.kv_cache import keeps_columns, shift
from opdkit.sampling.rows import Rows


def fed(
    models: Sequence[CausalLM], batch: Rows, texts: Sequence[list[int]]
) -> list[tuple[Rows, list[Tensor]]]:
    """Feeds each row its last token and a text; the rows with the hidden states [b, H] of each
    model after that, in one batch where all layers see all columns.

    Layers that see a window, or keep a state, would take padding behind a row for its own: there
    rows with texts of one length are fed together.
    """
    new = [[token, *text] for token, text in zip(batch.token.tolist(), texts, strict=True)]
    layers: list[Any] = [layer for cache in batch.caches for layer in cache.layers]
    columns = all(keeps_columns(layer) for layer in layers)
    if columns and not any(layer.is_sliding for layer in layers):
        return [(batch, _feed(models, batch, new))]
    parts = []
    for length in sorted({len(text) for text in new}):
        index = [i for i, text in enumerate(new) if len(text) == length]
        part = batch.copied(torch.tensor(index, device=batch.mask.device))
        mine = [new[i] for i in index]
        # a state takes one token after another
        pieces = [mine] if columns else [[[text[t]] for text in mine] for t in range(length)]
        for piece in pieces:
            states = _feed(models, part, piece)
        parts.append((part, states))
    return parts


def _feed(models: Sequence[CausalLM], batch: Rows, new: Sequence[list[int]]) -> list[Tensor]:
    """Puts tokens into the caches, those of each row right behind what it holds: hidden states
    [B, H] of each model after the last.

    Shorter ones have padding behind them, which goes to the row's left afterwards.
    """
    device = batch.mask.device
    lengths = torch.tensor([len(text) for text in new], device=device)
    width = max(len(text) for text in new)
    ids = torch.tensor([text + [0] * (width - len(text)) for text in new], device=device)
    columns = torch.arange(width, device=device)
    batch.mask = torch.cat([batch.mask, columns < lengths[:, None]], 1)
    places = batch.length[:, None] + columns.minimum(lengths[:, None] - 1)
    padding = [width - len(text) for text in new]
    ragged = any(padding)
    mask = batch.mask if batch.padded or ragged else None
    last = (torch.arange(len(new), device=device), lengths - 1)
    states = [
        hidden_states(model, ids, mask, places, cache)[last]
        for model, cache in zip(models, batch.caches)
    ]
    batch.length = batch.length + lengths
    if ragged:
        for cache in batch.caches:
            shift(cache, padding)
        held = torch.arange(batch.mask.shape[1], device=device)
        batch.mask = held >= len(held) - batch.length[:, None]
        batch.padded = not bool(batch.mask.all())
    return states
