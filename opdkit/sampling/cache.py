"""The key-value cache of a batch whose rows come and go: rows are aligned on the right, so padding is always on the left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdkit.errors import UserError

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

FREE_SHARE = 0.5  # of the accelerator's free memory goes to the cache
CPU_BYTES = 2 << 30


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache; refused where a layer keeps something else than keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=model.config)
    if odd := {type(layer).__name__ for layer in cache.layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}:
        raise UserError(
            f"{type(model).__name__} keeps {', '.join(sorted(odd))} between tokens, not only attention keys and values, so rows cannot join "
            "and leave its batch. Use a transformer with full or sliding-window attention, or sample with vLLM"
        )
    return cache


def select(cache: DynamicCache, index: Tensor, trim: int = 0) -> None:
    """Keeps (or repeats) rows `index` [b], without the first `trim` columns, in place."""
    for layer in _layers(cache):
        columns = layer.get_seq_length() - trim
        layer.keys, layer.values = (
            states[:, :, max(0, states.shape[2] - columns) :].index_select(0, index) for states in (layer.keys, layer.values)
        )
        _count(layer, columns)


def join(first: DynamicCache, second: DynamicCache) -> None:
    """Appends the rows of `second` to `first`, in place; the shorter one is padded on the left."""
    for a, b in zip(_layers(first), _layers(second), strict=True):
        columns = max(a.get_seq_length(), b.get_seq_length())
        a.keys, a.values = _stack(a.keys, b.keys), _stack(a.values, b.values)
        _count(a, columns)


def pad_left(states: Tensor, columns: int, dim: int) -> Tensor:
    """Zeros before the columns along `dim`, up to `columns` of them."""
    missing = columns - states.shape[dim]
    if missing == 0:
        return states
    shape = list(states.shape)
    shape[dim] = missing
    return torch.cat([states.new_zeros(shape), states], dim)


def tokens_that_fit(model: PreTrainedModel) -> int:
    """Cached tokens in half of the accelerator's free memory, or in 2 GiB of a CPU's."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    memory = FREE_SHARE * torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else CPU_BYTES
    return int(memory // per_token)


def _layers(cache: DynamicCache) -> list[Any]:
    return cache.layers


def _stack(a: Tensor, b: Tensor) -> Tensor:
    columns = max(a.shape[2], b.shape[2])
    return torch.cat([pad_left(a, columns, 2), pad_left(b, columns, 2)])


def _count(layer: Any, columns: int) -> None:
    """A sliding-window layer holds fewer columns than it has seen, and counts the latter."""
    if layer.is_sliding:
        layer.cumulative_length = columns
