"""Hugging Face causal language models and their tokenizers, from a folder or a hub name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opdkit.base.errors import UserError, nearest
from opdkit.models.offload import enough_memory
from opdkit.models.precision import widen
from opdkit.models.quantize import config_for, quantized, same_when_training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# a transformers PreTrainedModel or a peft wrapper of one: they share no class, only their methods
CausalLM = Any

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def dtype_of(name: str | None) -> torch.dtype | None:
    """A number type by its name in settings; None stays."""
    return None if name is None else DTYPES[name]


# ------------------------------------------------------------------------------------------ loading


def load_model(
    model: str | CausalLM,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantize: str | None = None,
) -> CausalLM:
    """A causal LM in eval mode from a folder or a hub name, its weights from safetensors only.

    A loaded model is returned as it is.

    `quantize` (8bit, 4bit) stores the linear layers of the body so, as they are read; all else, and
    every product, is of `dtype`.
    """
    if not isinstance(model, str):
        return model
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}{nearest(dtype, list(DTYPES))}")
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = (
        {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    )
    if quantize is not None:
        settings |= {
            "quantization_config": config_for(quantize, DTYPES[dtype]),
            "device_map": {"": str(device)},
        }
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
            f"the checkpoint {model!r} has no weights for {len(missing)} tensors of "
            f"{type(loaded).__name__}, for example {missing[0]}: they would stay random and the "
            "model would write noise. Use a complete checkpoint of a causal language model"
        )
    held = quantized(loaded)
    if quantize is not None and held != quantize:
        raise UserError(
            f"the checkpoint {model!r} is stored as {held} already: leave out quantize, or name "
            "the unquantised checkpoint"
        )
    same_when_training(loaded)
    return loaded.to(device).eval()


def load_advised(
    name: str,
    dtype: str,
    device: str,
    advice: str,
    *,
    trust_remote_code: bool = False,
    quantize: str | None = None,
    head: bool = False,
) -> CausalLM:
    """A model of a run by name, its vectors and, where asked for, its head widened (`precision`);
    where the device's memory does not suffice, `advice` says what would take less.
    """
    with enough_memory(f"{name} was loaded", advice):
        model = load_model(
            name,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            quantize=quantize,
        )
    widen(model, name, head)
    return model


def take_loaded(model: CausalLM, device: str, quantize: str | None = None) -> CausalLM:
    """A model of a run that a caller hands over as an object, on the run's device."""
    if quantize not in (None, quantized(model)):
        raise UserError(
            f"quantize={quantize} is done while a model is read, and this one is loaded "
            "already: give its name instead of the object, or load it quantised"
        )
    same_when_training(model)
    return model.to(device)


def load_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or a hub name. A loaded one is returned as it is."""
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    with _teaching("tokenizer", tokenizer):
        return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)


def parameter_count(model: str | CausalLM, trust_remote_code: bool = False) -> int:
    """Number of parameters, tied ones once.

    A folder or hub name is read for its configuration only: no weight is loaded.
    """
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
            f"there is no folder {name!r} to load the {what} from: check the path, or give the "
            "name of a hub repository"
        )
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if folder.is_dir():
            advice = (
                "the folder must be a Hugging Face checkpoint: config.json and *.safetensors for a "
                "model, tokenizer.json for a tokenizer. Pickled weights (*.bin) are not read, as "
                "loading them runs code: save the model again with save_pretrained"
            )
        else:
            advice = (
                "it is no local folder, so it was looked for on the hub: check the spelling, that "
                "the hub can be reached from here, and that you may read it (a gated repository "
                f"needs `hf auth login`); offline, give the folder of a downloaded {what}"
            )
        raise UserError(f"cannot load the {what} {name!r}: {reason}\n{advice}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode (no dropout, and no gradient checkpointing, which would drop the
    cache); every module's own mode afterwards.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
