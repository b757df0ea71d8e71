"""The student's weights as an engine takes them: names and tensors of its checkpoint, adapters
added or written on their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.adapters import has_adapters
from opdkit.models.load import CausalLM

# that vLLM computes in
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD = 4 << 30  # bytes of weights in one file


def engine_dtype(model: CausalLM, given: str | None) -> str:
    """What the engine computes in: what was given, or the dtype of the student's weights."""
    name = given or str(next(model.parameters()).dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(
            f"vLLM does not compute in {name}: give the sampler a dtype ({', '.join(DTYPES)}), or "
            "sample in this process (sampler=hf)"
        )
    return name


def adapter_rank(model: CausalLM) -> int:
    """The largest rank of the student's adapters."""
    if not has_adapters(model):
        raise UserError(
            "enable_lora=true sends adapters to the engine, but the student has none: set it to "
            "false, or give the run `lora`"
        )
    return max(config.r for config in model.peft_config.values())


@torch.no_grad()
def checkpoint_weights(model: CausalLM, merged: bool = True) -> dict[str, Tensor]:
    """Names and tensors, [...] of any shape, as a checkpoint of the model has them; tied ones once.

    The model stays as it is.

    Low-rank adapters are added to copies of the weights that they change; with `merged=False` they
    are left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if stored := sorted({str(p.dtype) for p in model.parameters() if not p.is_floating_point()}):
        raise UserError(
            f"the student's weights are quantised ({', '.join(stored)}), and an engine that is "
            "sent weights needs them whole: sample with the model in this process (sampler=hf), or "
            "do not quantise the student"
        )
    if not has_adapters(model):
        return revert_weight_conversion(
            model, {name: p.detach() for name, p in model.named_parameters()}
        )
    base = model.get_base_model()
    lora = dict(_lora_layers(model, base))
    weights = {}
    for name, parameter in base.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        module, _, kind = (
            name.replace(".base_layer", "").replace(".modules_to_save.default", "").rpartition(".")
        )
        weight = parameter.detach()
        if merged and kind == "weight" and module in lora:
            layer = lora[module]
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        weights[f"{module}.{kind}"] = weight
    return revert_weight_conversion(base, weights)


def _lora_layers(model: CausalLM, base: Any) -> Iterator[tuple[str, Any]]:
    """Layers with plain low-rank adapters by name; any other adapter is refused."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        plain = (
            isinstance(module, LoraLayer)
            and not module.lora_variant
            and hasattr(module, "get_delta_weight")
        )
        if not plain:
            kinds = ", ".join(sorted({str(c.peft_type.value) for c in model.peft_config.values()}))
            raise UserError(
                f"the adapters of the student ({kinds}) at {name} are not plain low-rank matrices, "
                "and a vLLM engine cannot take them over: use plain LoRA (run.lora), train all "
                "weights, or sample with the model in this process (sampler=hf)"
            )
        yield name, module


def save_adapters(model: CausalLM, folder: Path) -> Path:
    """The adapters alone, as peft writes them."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    return folder


def save_weights(
    weights: dict[str, Tensor], folder: Path, dtype: torch.dtype | None = None
) -> Path:
    """Safetensors files for an engine in another process, in shards, of weights [...] of any
    shape by name.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, weight in weights.items():
        tensor = weight.to("cpu", dtype if weight.is_floating_point() else None).contiguous()
        if shard and size + tensor.nbytes > SHARD:
            save_file(shard, folder / f"weights-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
        # safetensors refuses shared memory
        shard[name] = tensor.clone() if tensor.data_ptr() == weight.data_ptr() else tensor
        size += tensor.nbytes
    save_file(shard, folder / f"weights-{number:05d}.safetensors")
    return folder
