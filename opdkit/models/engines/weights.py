"""The student's weights as an engine takes them: names and tensors of its checkpoint, adapters
added or written on their own.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.adapters import has_adapters
from opdkit.models.load import CausalLM
from opdkit.models.sharding import is_spread, reshard
from opdkit.objective.parts import is_part, whole

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
def checkpoint_weights(model: CausalLM, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, [...] of any shape, as a checkpoint of the model has them; tied ones once.

    The model stays as it is. One that is spread over processes is put together on all of them, a
    layer at a time: each goes through to the end, whether it keeps them or not.

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
    reshard(model)
    base, lora = model, {}
    if has_adapters(model):
        base = model.get_base_model()
        lora = dict(_lora_layers(model, base))
    layers: dict[str, dict[str, Tensor]] = {}
    for name, parameter in base.named_parameters():
        if ".lora_" not in name and ".original_module." not in name:
            own = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
            layers.setdefault(_layer(own), {})[own] = parameter.detach()
    for parts in layers.values():
        weights = {}
        for name, part in parts.items():
            weight = whole(part)
            layer = lora.get(name) if merged else None
            for adapter in layer.active_adapters if layer is not None else ():
                weight = weight + _delta(layer, adapter).to(weight.dtype)
            weights[name] = weight
        yield from revert_weight_conversion(base, weights).items()


def _layer(name: str) -> str:
    """The layer to which a parameter belongs: its name up to the first number, "" for those of
    none. What checkpoints store otherwise, such as the matrices of experts, lies within one.
    """
    numbered = re.match(r"(.*?\.)?\d+\.", name)
    return numbered.group() if numbered else ""


def _delta(layer: Any, adapter: str) -> Tensor:
    """[...]: what an adapter adds to the weight of its layer, of matrices that are put together."""
    own = [m for name, m in layer.named_modules() if name.partition(".")[0] != "base_layer"]
    parts = [(m, n, p) for m in own for n, p in m._parameters.items() if is_part(p)]
    for module, name, part in parts:
        module._parameters[name] = torch.nn.Parameter(whole(part.detach()), requires_grad=False)
    try:
        delta: Tensor = layer.get_delta_weight(adapter)
        return delta
    finally:
        for module, name, part in parts:
            module._parameters[name] = part


def _lora_layers(model: CausalLM, base: Any) -> Iterator[tuple[str, Any]]:
    """Layers with plain low-rank adapters by the name of the weight that they change; any other
    adapter is refused.
    """
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
        changed = getattr(module, "parameter_name", "weight")  # of experts that are one matrix
        yield f"{name.replace('.base_layer', '')}.{changed}", module


@torch.no_grad()
def save_adapters(model: CausalLM, folder: Path | None) -> None:
    """The adapters alone, as peft writes them.

    Those of a model that is spread over processes are put together on all of them; None: nothing is
    kept here.
    """
    given = {}
    if is_spread(model):
        reshard(model)
        named = model.named_parameters()
        given["state_dict"] = {n: whole(p.detach()).cpu() for n, p in named if p.requires_grad}
    if folder is not None:
        model.save_pretrained(
            str(folder), safe_serialization=True, save_embedding_layers=False, **given
        )


def save_weights(
    weights: Iterable[tuple[str, Tensor]], folder: Path | None, dtype: torch.dtype | None = None
) -> None:
    """Safetensors files for an engine in another process, in shards, of weights [...] of any
    shape by name; None: they are gone through, and nothing is kept here.
    """
    from safetensors.torch import save_file

    if folder is None:
        deque(weights, maxlen=0)
        return
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, weight in weights:
        tensor = weight.to("cpu", dtype if weight.is_floating_point() else None).contiguous()
        if shard and size + tensor.nbytes > SHARD:
            save_file(shard, folder / f"weights-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
        # safetensors refuses shared memory
        shard[name] = tensor.clone() if tensor.data_ptr() == weight.data_ptr() else tensor
        size += tensor.nbytes
    save_file(shard, folder / f"weights-{number:05d}.safetensors")
