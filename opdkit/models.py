"""Hugging Face causal language models: loading, the split into body and head, and which tokenizers agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opdkit.errors import UserError, nearest
from opdkit.head import Head
from opdkit.quantize import config_for, quantized, settle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CausalLM = Any  # a transformers PreTrainedModel or a peft wrapper of one: they share no class, only their methods

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
AGREE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest logit: body and head against the whole model
AGREE_HALF = 2e-2  # in 16 bits a logit carries 8 to 11 significant bits
PROBE = 8  # tokens read by `check_head`

# ------------------------------------------------------------------------------------------------------------- loading


def load_model(
    model: str | CausalLM,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantize: str | None = None,
) -> CausalLM:
    """A causal LM in eval mode from a folder or a hub name, its weights from safetensors only. A loaded model is returned as it is.

    `quantize` (8bit, 4bit) stores the linear layers of the body so, as they are read; all else, and every product, is of `dtype`.
    """
    if not isinstance(model, str):
        return model
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}{nearest(dtype, list(DTYPES))}")
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if quantize is not None:
        settings |= {"quantization_config": config_for(quantize, DTYPES[dtype]), "device_map": {"": str(device)}}
    with _teaching("model", model):
        pair: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    loaded, report = pair
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the checkpoint {model!r} has no weights for {len(missing)} tensors of {type(loaded).__name__}, for example {missing[0]}: "
            "they would stay random and the model would write noise. Use a complete checkpoint of a causal language model"
        )
    held = quantized(loaded)
    if quantize is not None and held != quantize:
        raise UserError(
            f"the checkpoint {model!r} is stored as {held} already: leave out quantize, or name the unquantised checkpoint"
        )
    settle(loaded)
    return loaded.to(device).eval()


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or a hub name. A loaded one is returned as it is."""
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    with _teaching("tokenizer", tokenizer):
        return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)


def parameter_count(model: str | CausalLM, trust_remote_code: bool = False) -> int:
    """Number of parameters, tied ones once. A folder or hub name is read for its configuration only: no weight is loaded."""
    if not isinstance(model, str):
        return sum(p.numel() for p in model.parameters())
    from transformers import AutoConfig, AutoModelForCausalLM

    with _teaching("model", model):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in empty.parameters())


@contextmanager
def _teaching(what: str, name: str) -> Iterator[None]:
    """Turns what transformers raises for an unusable name into advice."""
    folder = Path(name).expanduser()
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~"))):
        raise UserError(
            f"there is no folder {name!r} to load the {what} from: check the path, or give the name of a hub repository"
        )
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if folder.is_dir():
            advice = (
                "the folder must be a Hugging Face checkpoint: config.json and *.safetensors for a model, tokenizer.json for a tokenizer. "
                "Pickled weights (*.bin) are not read, as loading them runs code: save the model again with save_pretrained"
            )
        else:
            advice = (
                f"it is no local folder, so it was looked for on the hub: check the spelling, that the hub can be reached from here, and "
                f"that you may read it (a gated repository needs `hf auth login`); offline, give the folder of a downloaded {what}"
            )
        raise UserError(f"cannot load the {what} {name!r}: {reason}\n{advice}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode (no dropout, and no gradient checkpointing, which would drop the cache); every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------------------------------- body and head


def hidden_states(
    model: CausalLM,
    input_ids: Tensor,  # [B, T]
    attention_mask: Tensor | None,  # [B, cached + T], 0 at padding; None: no padding on the left
    position_ids: Tensor | None = None,  # [B, T]; None: counted along the mask
    past_key_values: Any = None,  # a cache, extended in place
) -> Tensor:
    """[B, T, H]: what the head receives (the last hidden states after the final norm). No logits are computed."""
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
    output = model.get_decoder()(  # a method of the model also under a peft wrapper, where the adapters sit inside its layers
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=past_key_values is not None,
    )
    return output.last_hidden_state


def head_of(model: CausalLM, vocab: int | None = None) -> Head:
    """The model's head, sharing its weight. `vocab` keeps the first rows only: see `real_vocabulary`."""
    linear = model.get_output_embeddings()
    if hasattr(linear, "modules_to_save"):  # peft trains a copy of the whole head
        linear = linear.original_module if linear.disable_adapters else linear.modules_to_save[linear.active_adapters[0]]
    plain = isinstance(linear, nn.Linear) and linear.weight.is_floating_point()  # 8-bit layers are linear layers too, of integers
    if not plain or linear.weight.shape != (linear.out_features, linear.in_features):
        raise UserError(
            f"the head of {type(model).__name__} is a {type(linear).__name__}, not a plain linear layer, so its logits cannot be computed "
            "chunk by chunk. Leave lm_head out of adapters and quantisation (to train it under peft: modules_to_save=['lm_head'])"
        )
    config = model.config.get_text_config()
    scale = 1.0
    if isinstance(factor := getattr(config, "logit_scale", None), (int, float)):  # Cohere
        scale *= factor
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        scale /= divisor
    return Head(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None), vocab)


def check_head(model: CausalLM) -> None:
    """Refuses a model whose logits are not those of `hidden_states` and `head_of`: a few tokens are run through both."""
    head = head_of(model)
    weight = model.get_output_embeddings().weight
    ids = torch.arange(PROBE, device=weight.device)[None] % len(weight)
    mask = torch.ones_like(ids)
    with evaluating(model), torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits = head.logits(hidden_states(model, ids, mask))
    if not bool(expected.isfinite().all()):
        raise UserError(
            f"{model.config._name_or_path or type(model).__name__} gives logits that are not finite for the first {PROBE} tokens of its "
            f"vocabulary: its files are damaged, or {weight.dtype} is too narrow for it. Nothing can be learnt with it: use other files, "
            "or float32"
        )
    allowed = AGREE.get(weight.dtype, AGREE_HALF) * max(1.0, float(expected.abs().max()))
    difference = float((logits - expected).abs().max()) if logits.shape == expected.shape else float("inf")
    if not difference <= allowed:
        raise UserError(
            f"{type(model).__name__} turns its last hidden states into logits in a way that opdkit does not know: its own logits differ from "
            f"hidden states x head by {difference:.3g} (allowed {allowed:.3g}). Every loss would be wrong; use a model whose logits are "
            "cap(scale * (hidden @ weight.T + bias))"
        )


# ---------------------------------------------------------------------------------------------------------- tokenizers


def real_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the head that stand for a token: one more than the largest id. The rows behind them only pad the matrix."""
    return max(tokenizer.get_vocab().values()) + 1


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """None where every token has the same id in both, else what differs. Sizes are not compared: they also count padding."""
    ids_a, ids_b = a.get_vocab(), b.get_vocab()
    if ids_a == ids_b:
        return None
    differing = sorted(
        (t for t in ids_a.keys() | ids_b.keys() if ids_a.get(t) != ids_b.get(t)),
        key=lambda t: (t not in ids_a or t not in ids_b, ids_a.get(t, ids_b.get(t)), t),
    )

    token = differing[0]

    def says(ids: dict[str, int]) -> str:
        return f"has id {ids[token]}" if token in ids else "is unknown"

    return (
        f"the tokenizers {a.name_or_path!r} and {b.name_or_path!r} differ in {len(differing)} of {len(ids_a.keys() | ids_b.keys())} tokens: "
        f"{token!r} {says(ids_a)} in the first and {says(ids_b)} in the second"
    )


def stop_ids(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a response: the end-of-sequence ids of the generation settings (an id, a list or none) and of the tokenizer."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = declared if isinstance(declared, (list, tuple, set)) else [declared]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}
