"""Attention of one new token to its cache on a CPU: two batched products, where the stock kernel is
made for many queries.

It reads each key and value once, whatever the number of query heads that share it; the stock path
copies them for every query head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opdkit.sampling.kv_cache import keeps_columns

NAME = "opdkit_decode"


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, heads, T, width]
    key: Tensor,  # [B, key heads, C, width]
    value: Tensor,
    # [B, 1, T, C]: bool, or added to the scores; None: all columns are seen
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What `sdpa` returns, [B, T, heads, width]; for more than one query, or with options that
    change the formula, by `sdpa` itself.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (
        query.shape[2] != 1
        or options.get("position_bias") is not None
        or options.get("cache") is not None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    rows, heads, _, width = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], width) * (
        width**-0.5 if scaling is None else scaling
    )
    scores = grouped @ key.transpose(2, 3)
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]
        scores = (
            scores.masked_fill_(~mask, -torch.inf)
            if mask.dtype == torch.bool
            else scores.add_(mask)
        )
    return (scores.softmax(-1) @ value).reshape(rows, 1, heads, value.shape[-1]), None


def spread(model: Any, mask: Tensor | None, cache: Any) -> Tensor | None:
    """The mask [B, C] of one new token as this attention takes it, [B, 1, 1, C], where all layers
    see all columns: the model makes none.
    """
    own = model.config.get_text_config()._attn_implementation == NAME
    plain = all(keeps_columns(layer) and not layer.is_sliding for layer in cache.layers)
    return mask[:, None, None] if own and mask is not None and plain else mask


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """The model with this attention, where it has the stock one and runs on a CPU."""
    config = model.config.get_text_config()
    if model.device.type != "cpu" or config._attn_implementation != "sdpa":
        yield
        return
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, decode_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
