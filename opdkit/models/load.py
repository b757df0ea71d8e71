"""Hugging Face causal language models and their tokenizers, from a folder or a hub name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opdkit.base.errors import UserError, nearest
from opdkit.base.files import exists
from opdkit.models.adapters import base_of, with_adapters_of
from opdkit.models.complete import check_complete
from opdkit.models.files import damages
from opdkit.models.offload import enough_memory
from opdkit.models.precision import widen
from opdkit.models.quantize import config_for, left_whole, quantized, same_when_training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# a transformers PreTrainedModel or a peft wrapper of one: they share no class, only their methods
CausalLM = Any

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# files of which a tokenizer has one
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

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

    A loaded model is returned as it is. Adapters (a folder of peft's) are loaded with the model
    that they belong to, and added to its weights unless these are quantised.

    `quantize` (8bit, 4bit) stores the linear layers of the body so, as they are read; all else, and
    every product, is of `dtype`.
    """
    if not isinstance(model, str):
        return model
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}{nearest(dtype, list(DTYPES))}")
    if (base := base_of(model)) is not None:
        below = load_model(base, dtype, device, trust_remote_code, attn_implementation, quantize)
        with _teaching("adapters", model):
            return with_adapters_of(below, model, merge=quantize is None).to(device).eval()
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {}
    if quantize is not None:
        settings = {
            "quantization_config": config_for(quantize, DTYPES[dtype]),
            "device_map": {"": str(device)},
        }
    attention = attention_for(load_config(model, trust_remote_code), attn_implementation)
    with _teaching("model", model):
        pair: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            attn_implementation=attention,
            **settings,
        )
    loaded, report = pair
    check_complete(model, loaded, report)
    held = quantized(loaded)
    if quantize is not None and held != quantize:
        raise UserError(
            f"the checkpoint {model!r} is stored as {held} already: leave out quantize, or name "
            "the unquantised checkpoint"
        )
    if quantize is not None and (left := left_whole(loaded)):
        print(f"opdkit: quantize={quantize} of {model}: {left}", file=sys.stderr)
    text = loaded.config.get_text_config()
    mixture = hasattr(text, "num_experts") or hasattr(text, "num_local_experts")
    if mixture and DTYPES[dtype] == torch.float64:
        loaded.set_experts_implementation("eager")  # the grouped product has no float64
    same_when_training(loaded)
    return loaded.to(device).eval()


def attention_for(config: Any, asked: str | None = None) -> str | None:
    """The attention that a model is loaded with; None: transformers' choice.

    Gemma 2 caps its attention scores, which the usual kernel (sdpa) leaves out without a word.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and asked == "sdpa":
        raise UserError(
            "attn_implementation=sdpa leaves out the cap that this model puts on its attention "
            "scores, so it would compute another model: use eager, or flash_attention_2"
        )
    return "eager" if capped and asked is None else asked


def load_advised(
    name: str,
    dtype: str,
    device: str,
    advice: str,
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
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
            attn_implementation=attn_implementation,
            quantize=quantize,
        )
    widen(model, name, head)
    return model


def take_loaded(
    model: CausalLM, device: str, quantize: str | None = None, dtype: str | None = None
) -> CausalLM:
    """A model of a run that a caller hands over as an object, on the run's device.

    With `dtype` its weights are of that, as if it had been loaded by name: steps of a small
    learning rate vanish in bfloat16. Where its attention leaves out what its configuration says, it
    gets one that does not.
    """
    if quantize not in (None, quantized(model)):
        raise UserError(
            f"quantize={quantize} is done while a model is read, and this one is loaded "
            "already: give its name instead of the object, or load it quantised"
        )
    same_when_training(model)
    if dtype is not None and quantized(model) is None and model.dtype != DTYPES[dtype]:
        before = str(model.dtype).removeprefix("torch.")
        print(f"opdkit: the loaded student is {before}; it trains in {dtype}", file=sys.stderr)
        model = model.to(DTYPES[dtype])
    used = model.config.get_text_config()._attn_implementation
    if used == "sdpa" and (needed := attention_for(model.config)) is not None:
        model.set_attn_implementation(needed)
        print(
            f"opdkit: {type(model).__name__} caps its attention scores, which sdpa leaves out: it "
            f"computes with attn_implementation={needed} from now on",
            file=sys.stderr,
        )
    return model.to(device)


def load_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or a hub name. A loaded one is returned as it is."""
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    base = base_of(tokenizer)
    if base is not None and not any((Path(tokenizer) / name).is_file() for name in TOKENIZER):
        return load_tokenizer(base, trust_remote_code)
    with _teaching("tokenizer", tokenizer):
        return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """A model's configuration; of a folder of adapters that of the model below them."""
    from transformers import AutoConfig

    base = base_of(name)
    if base is not None:
        return load_config(base, trust_remote_code)
    with _teaching("model", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def generation_settings(model: str | CausalLM, trust_remote_code: bool = False) -> Any:
    """A model's generation settings: its own file, else what its configuration says."""
    if not isinstance(model, str):
        return getattr(model, "generation_config", None)
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except (OSError, ValueError):  # there is no such file, or it cannot be read
        if base := base_of(model):
            return generation_settings(base, trust_remote_code)
        return GenerationConfig.from_model_config(load_config(model, trust_remote_code))


def parameter_count(model: str | CausalLM, trust_remote_code: bool = False) -> int:
    """Number of parameters, tied ones once.

    A folder or hub name is read for its configuration only: no weight is loaded.
    """
    if not isinstance(model, str):
        return sum(p.numel() for p in model.parameters())
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code)
    with _teaching("model", model), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in empty.parameters())


@contextmanager
def _teaching(what: str, name: str) -> Iterator[None]:
    """Turns what transformers raises for an unusable name into advice."""
    folder = Path(name).expanduser()
    if not exists(folder) and (folder.is_absolute() or name.startswith((".", "~"))):
        raise UserError(
            f"there is no folder {name!r} to load the {what} from: check the path, or give the "
            "name of a hub repository"
        )
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    # files that are damaged, of another shape, or stored in a way whose package is not there:
    # transformers raises many kinds of errors for them
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"cannot load the {what} {name!r}: {reason}\n{_advice(what, name, error)}"
        ) from error


def _advice(what: str, name: str, error: Exception) -> str:
    """What to do about a name that could not be loaded."""
    folder = Path(name).expanduser()
    if exists(folder / "shards" / ".metadata"):
        return (
            "several processes wrote this checkpoint, each its own parts: make plain weights of it "
            f"with `opdkit export {name} DIR`, and name that folder"
        )
    if exists(folder) and folder.is_dir() and (damaged := next(damages(folder), None)):
        return damaged
    if method := stored_as(name):
        return (
            f"its weights are stored as {method}, which needs a package and often a GPU that are "
            "not here. As a teacher serve it (vllm serve, teacher=server:URL); as a student, or in "
            "this process, use the unquantised checkpoint, with quantize=4bit where memory is short"
        )
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return "it brings code of its own: read it, then set trust_remote_code=true"
    if exists(folder) and folder.is_dir():
        return (
            "the folder must be a Hugging Face checkpoint: config.json and *.safetensors for a "
            "model, tokenizer.json for a tokenizer. Pickled weights (*.bin) are not read, as "
            "loading them runs code: save the model again with save_pretrained"
        )
    return (
        "it is no local folder, so it was looked for on the hub: check the spelling, that the hub "
        "can be reached from here, and that you may read it (a gated repository needs `hf auth "
        f"login`); offline, give the folder of a downloaded {what}"
    )


def stored_as(name: str) -> str | None:
    """How a checkpoint's configuration says its weights are quantised (gptq, awq, ...)."""
    from transformers import PretrainedConfig

    try:
        said = PretrainedConfig.get_config_dict(name)[0].get("quantization_config")
    except Exception:  # the configuration itself is what cannot be read
        return None
    return str(said.get("quant_method")) if isinstance(said, dict) else None


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
