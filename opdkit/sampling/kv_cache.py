"""The key-value cache of a batch whose rows come and go: rows are aligned on the right, so padding
is always on the left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.load import CausalLM
from opdkit.models.precision import products_of
from opdkit.objective.products import narrow

if TYPE_CHECKING:
    from transformers import DynamicCache

FREE_SHARE = 0.5  # of the accelerator's free memory goes to the cache
CPU_BYTES = 2 << 30


def new_cache(model: CausalLM) -> DynamicCache:
    """An empty cache; refused where a layer keeps something else than keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    from opdkit.sampling.kv_layer import GrowingLayer

    cache = DynamicCache(config=model.config)
    if odd := {
        type(layer).__name__
        for layer in cache.layers
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    }:
        raise UserError(
            f"{type(model).__name__} keeps {', '.join(sorted(odd))} between tokens, not only "
            "attention keys and values, so rows cannot join and leave its batch. Use a transformer "
            "with full or sliding-window attention, or sample with vLLM"
        )
    products = products_of(model)
    kept = products if narrow(products) else None
    cache.layers = [
        layer if isinstance(layer, DynamicSlidingWindowLayer) else GrowingLayer(kept)
        for layer in cache.layers
    ]
    return cache


def select(cache: DynamicCache, index: Tensor, trim: int = 0) -> None:
    """Keeps (or repeats) rows `index` [b], without the first `trim` columns, in place."""
    for layer in _layers(cache):
        columns = layer.get_seq_length() - trim
        if layer.is_sliding:
            held = min(columns, layer.keys.shape[2])
            layer.keys, layer.values = (
                s[:, :, s.shape[2] - held :].index_select(0, index)
                for s in (layer.keys, layer.values)
            )
            layer.cumulative_length = columns  # all columns seen, of which the window's are held
        else:
            layer.take(index, columns)


def shrink(cache: DynamicCache, holes: Tensor, moved: Tensor, rows: int) -> None:
    """Keeps the first `rows` rows, after rows `moved` [m] from behind have been written into
    `holes` [m] among them; in place.
    """
    for layer in _layers(cache):
        if len(holes):
            layer.keys[holes], layer.values[holes] = layer.keys[moved], layer.values[moved]
        if layer.is_sliding:
            layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]
        else:
            layer.narrow(rows)


def join(first: DynamicCache, second: DynamicCache) -> None:
    """Appends the rows of `second` to `first`, in place; the shorter one is padded on the left."""
    for a, b in zip(_layers(first), _layers(second), strict=True):
        keys, values = _stack(a.keys, b.keys), _stack(a.values, b.values)
        if a.is_sliding:
            a.keys, a.values = keys, values
            a.cumulative_length = max(a.cumulative_length, b.cumulative_length)
        else:
            a.hold(keys, values)


def pad_left(states: Tensor, columns: int, dim: int) -> Tensor:
    """Zeros before the columns along `dim`, up to `columns` of them: [B, c] to [B, columns] for
    dim 1, and so on.
    """
    missing = columns - states.shape[dim]
    if missing == 0:
        return states
    shape = list(states.shape)
    shape[dim] = missing
    return torch.cat([states.new_zeros(shape), states], dim)


def tokens_that_fit(model: CausalLM) -> int:
    """Cached tokens in half of the accelerator's free memory, or in 2 GiB of a CPU's."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * products_of(model).itemsize
    memory = (
        FREE_SHARE * torch.cuda.mem_get_info(model.device)[0]
        if model.device.type == "cuda"
        else CPU_BYTES
    )
    return int(memory // per_token)


def _layers(cache: DynamicCache) -> list[Any]:
    return cache.layers


def _stack(a: Tensor, b: Tensor) -> Tensor:
    columns = max(a.shape[2], b.shape[2])
    return torch.cat([pad_left(a, columns, 2), pad_left(b, columns, 2)])
