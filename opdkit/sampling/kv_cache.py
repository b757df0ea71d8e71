"""The cache of a batch whose rows come and go: keys and values of columns that are aligned on the
right, so that padding is always on the left, and for layers of linear attention a state per row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.body import AGREE, AGREE_HALF, hidden_states
from opdkit.models.load import CausalLM, evaluating
from opdkit.models.precision import products_of
from opdkit.objective.products import narrow

if TYPE_CHECKING:
    from transformers import DynamicCache

FREE_SHARE = 0.5  # of the accelerator's free memory goes to the cache
CPU_BYTES = 2 << 30


def odd_layers(model: CausalLM) -> list[str]:
    """Kinds of layers of a model's cache that hold something else than keys and values, or a state
    per row: rows cannot join and leave a batch of such a model.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionLayer,
    )

    known = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
    layers = DynamicCache(config=model.config).layers
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in known})


def refuse_odd(model: CausalLM) -> None:
    """Refuses a model that cannot be sampled from in this process."""
    if odd := odd_layers(model):
        raise UserError(
            f"{type(model).__name__} keeps {', '.join(odd)} between tokens, not only attention "
            "keys and values or a state of each row, so rows cannot join and leave its batch. "
            "Sample with vLLM (sampler=vllm), with which the run then evaluates too"
        )


@torch.no_grad()
def check_states(model: CausalLM) -> None:
    """Refuses a model that cannot be sampled from in this process: where layers keep states, two
    rows are read with padding, then a token from the cache, as they should be without either.
    """
    refuse_odd(model)
    cache = new_cache(model)
    if all(keeps_columns(layer) for layer in _layers(cache)):
        return
    ids = torch.arange(1, 9, device=model.device).expand(2, -1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    with evaluating(model):
        hidden_states(model, ids[:, :-1], mask[:, :-1], past_key_values=cache)
        places = (mask.sum(1) - 1)[:, None]
        got = hidden_states(model, ids[:, -1:], mask, places, cache)[:, -1]
        want = torch.cat([hidden_states(model, ids[:1, n:], None)[:, -1] for n in (3, 0)])
    allowed = AGREE.get(products_of(model), AGREE_HALF) * max(1.0, float(want.abs().max()))
    if not float((got - want).abs().max()) <= allowed:
        raise UserError(
            f"{type(model).__name__} reads a row otherwise when it is padded, or from its cache: "
            "answers would not be drawn from what is trained. Sample with vLLM (sampler=vllm)"
        )


def new_cache(model: CausalLM) -> DynamicCache:
    """An empty cache for a batch."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    from opdkit.sampling.kv_layer import GrowingLayer

    refuse_odd(model)
    cache = DynamicCache(config=model.config)
    products = products_of(model)
    kept = products if narrow(products) else None
    cache.layers = [
        GrowingLayer(kept) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def select(cache: DynamicCache, index: Tensor, trim: int = 0) -> None:
    """Keeps (or repeats) rows `index` [b], without the first `trim` columns, in place."""
    for layer in _layers(cache):
        if not keeps_columns(layer):
            _each_state(layer, lambda state, _: state.index_select(0, index))
            continue
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


def taken(cache: DynamicCache, index: Tensor, trim: int = 0) -> DynamicCache:
    """A cache of rows `index` [b] alone, without the first `trim` columns; the other stays."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in _layers(other):
        if not keeps_columns(layer):
            layer.conv_states, layer.recurrent_states = (
                type(states)(states) for states in (layer.conv_states, layer.recurrent_states)
            )
    select(other, index, trim)
    return other


def shift(cache: DynamicCache, right: Sequence[int]) -> None:
    """Moves the columns of each row to the right, by so many, in place; what is behind the end is
    dropped. For full attention.
    """
    for layer in _layers(cache):
        layer.shift(right)


def shrink(cache: DynamicCache, holes: Tensor, moved: Tensor, rows: int) -> None:
    """Keeps the first `rows` rows, after rows `moved` [m] from behind have been written into
    `holes` [m] among them; in place.
    """
    for layer in _layers(cache):
        if not keeps_columns(layer):
            _each_state(layer, lambda state, _: _moved(state, holes, moved, rows))
            continue
        if len(holes):
            layer.keys[holes], layer.values[holes] = layer.keys[moved], layer.values[moved]
        if layer.is_sliding:
            layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]
        else:
            layer.narrow(rows)


def join(first: DynamicCache, *others: DynamicCache) -> None:
    """Appends the rows of others to `first`, in place; the shorter ones are padded on the left."""
    for layer, *more in zip(_layers(first), *map(_layers, others), strict=True):
        if not keeps_columns(layer):
            for other in more:
                _each_state(layer, lambda state, new: torch.cat([state, new]), other)
        elif layer.is_sliding:
            every = [layer, *more]
            layer.keys = _stack([one.keys for one in every])
            layer.values = _stack([one.values for one in every])
            layer.cumulative_length = max(one.cumulative_length for one in every)
        else:
            layer.join(more)


def keeps_columns(layer: Any) -> bool:
    """Whether a layer keeps something of every token; one of linear attention keeps a state."""
    return hasattr(layer, "keys")


def _each_state(layer: Any, change: Callable[[Tensor, Any], Tensor], other: Any = None) -> None:
    """Changes each state [B, ...] of a layer of linear attention, given the same one of another."""
    for name in ("conv_states", "recurrent_states"):
        states, others = getattr(layer, name), getattr(other, name, None)
        for i in range(len(states)):
            if states[i] is not None:
                states[i] = change(states[i], None if others is None else others[i])


def _moved(state: Tensor, holes: Tensor, moved: Tensor, rows: int) -> Tensor:
    """[rows, ...]: the first rows of a state [B, ...], after rows `moved` [m] were written into
    `holes` [m].
    """
    if len(holes):
        state[holes] = state[moved]
    return state[:rows]


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


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """States [b, heads, c, width] one below another, padded on the left."""
    columns = max(part.shape[2] for part in parts)
    return torch.cat([pad_left(part, columns, 2) for part in parts])
