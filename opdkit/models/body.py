"""A model as body and head: the last hidden states, the head that is shared with it, and the check
that these two are the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from opdkit.base.errors import UserError
from opdkit.models.adapters import has_adapters
from opdkit.models.load import CausalLM, evaluating
from opdkit.models.precision import computing, head_products_of, products_of
from opdkit.models.tokenizers import usable
from opdkit.objective.actions import Actions
from opdkit.objective.head import Head

# of the largest logit: body and head against the whole model
AGREE = {torch.float64: 1e-9, torch.float32: 1e-4}
AGREE_HALF = 2e-2  # in 16 bits a logit carries 8 to 11 significant bits
PROBE = 8  # tokens read by `check_head`
ACTIONS = "opdkit_actions"  # attribute of a model; a copy keeps it


def decoder_of(model: CausalLM) -> Any:
    """What computes the last hidden states, also under a peft wrapper, whose adapters sit inside
    its layers.
    """
    decoder: Any = model.get_decoder()
    base = model.get_base_model() if has_adapters(model) else model
    return base.model if decoder is base else decoder  # Llama 4 calls itself its decoder


def layers_of(model: CausalLM) -> list[nn.Module]:
    """The layers of its decoder, in the order in which hidden states pass through them."""
    stacks = [part for part in decoder_of(model).children() if isinstance(part, nn.ModuleList)]
    return list(max(stacks, key=len, default=()))


def hidden_states(
    model: CausalLM,
    input_ids: Tensor,  # [B, T]
    attention_mask: Tensor | None,  # [B, cached + T], 0 at padding; None: no padding on the left
    position_ids: Tensor | None = None,  # [B, T]; None: counted along the mask
    past_key_values: Any = None,  # a cache, extended in place
) -> Tensor:
    """[B, T, H]: what the head receives (the last hidden states after the final norm).

    No logits are computed. The model computes in its own numbers (`precision`), whatever surrounds
    the call.
    """
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
    with computing(model):
        output = decoder_of(model)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        )
    return output.last_hidden_state


def act_in(model: CausalLM, actions: Actions | None) -> None:
    """Restricts a model, and copies of it, to the bins of an action; None: it writes text."""
    setattr(model, ACTIONS, actions)


def head_of(model: CausalLM, vocab: int | None = None) -> Head:
    """The model's head, sharing its weight, and restricted where the model is (`act_in`).

    `vocab` keeps the first rows only: see `real_vocabulary`.
    """
    linear = model.get_output_embeddings()
    if hasattr(linear, "modules_to_save"):  # peft trains a copy of the whole head
        linear = (
            linear.original_module
            if linear.disable_adapters
            else linear.modules_to_save[linear.active_adapters[0]]
        )
    # 8-bit layers are linear layers too, of integers
    plain = isinstance(linear, nn.Linear) and linear.weight.is_floating_point()
    if not plain or linear.weight.shape != (linear.out_features, linear.in_features):
        raise UserError(
            f"the head of {type(model).__name__} is a {type(linear).__name__}, not a plain linear "
            "layer, so its logits cannot be computed chunk by chunk. Leave lm_head out of adapters "
            "and quantisation (to train it under peft: modules_to_save=['lm_head'])"
        )
    config = model.config.get_text_config()
    scale = 1.0
    if isinstance(factor := getattr(config, "logit_scale", None), (int, float)):  # Cohere
        scale *= factor
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        scale /= divisor
    return Head(
        linear.weight,
        linear.bias,
        scale,
        getattr(config, "final_logit_softcapping", None),
        vocab,
        head_products_of(model),
        getattr(model, ACTIONS, None),
    )


def shared_vocabulary(heads: Sequence[Head], tokenizer: Any) -> int:
    """Ids that every head can write: the tokenizer's, or fewer where a head lacks added tokens.

    Rows behind them only pad the matrix.
    """
    rows = [
        len(h.weight) if h.vocab is None else min(h.vocab, len(h.weight))
        for h in heads
        if h.weight is not None
    ]
    return usable(tokenizer, min(rows))


def kept_rows(heads: Sequence[Head], vocabulary: int) -> int | None:
    """What heads are cut to; None where no head has more rows."""
    longer = any(h.weight is not None and len(h.weight) > vocabulary for h in heads)
    return vocabulary if longer else None


def check_head(model: CausalLM) -> None:
    """Refuses a model whose logits are not those of `hidden_states` and `head_of`: a few tokens are
    run through both.
    """
    head = replace(head_of(model), actions=None)
    weight = model.get_output_embeddings().weight
    ids = torch.arange(PROBE, device=weight.device)[None] % len(weight)
    mask = torch.ones_like(ids)
    with evaluating(model), computing(model), torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits = head.logits(hidden_states(model, ids, mask))
    if not bool(expected.isfinite().all()):
        raise UserError(
            f"{model.config._name_or_path or type(model).__name__} gives logits that are not "
            f"finite for the first {PROBE} tokens of its vocabulary: its files are damaged, or "
            f"{weight.dtype} is too narrow for it. Nothing can be learnt with it: use other files, "
            "or float32"
        )
    allowed = AGREE.get(products_of(model), AGREE_HALF) * max(1.0, float(expected.abs().max()))
    difference = (
        float((logits - expected).abs().max()) if logits.shape == expected.shape else float("inf")
    )
    if not difference <= allowed:
        raise UserError(
            f"{type(model).__name__} turns its last hidden states into logits in a way that opdkit "
            f"does not know: its own logits differ from hidden states x head by {difference:.3g} "
            f"(allowed {allowed:.3g}). Every loss would be wrong; use a model whose logits are "
            "cap(scale * (hidden @ weight.T + bias))"
        )
