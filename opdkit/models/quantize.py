"""Weights in 8 or 4 bits (bitsandbytes): how they are loaded, what they take, and how adapters on
them become a plain model again.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from opdkit.base.errors import UserError, nearest

QUANTIZE = ("8bit", "4bit")
BYTES = {
    "8bit": 1.0,
    "4bit": 0.5 + 1 / 64 + 4 / (64 * 256),
}  # per weight: 8 bits have 4 bytes per row besides, 4 bits a scale per 64
PACKAGES = ("bitsandbytes", "accelerate")
INSTALL = "pip install 'opdkit[quantize]'"

# it asks for kernels that `same_when_training` does without
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def check_quantize(value: str | None) -> None:
    """A ValueError for what is not a way to store weights."""
    if value is not None and value not in QUANTIZE:
        raise ValueError(
            f"quantize={value!r} is not a way to store "
            f"weights{nearest(str(value), list(QUANTIZE))}; null: as they are"
        )


def available() -> str:
    """What this installation can quantise with, in a few words."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"not available without {' and '.join(missing)}: {INSTALL}"
    where = "on the GPU" if torch.cuda.is_available() else "on the CPU: slow, for trying things out"
    return f"8bit and 4bit by bitsandbytes {importlib.metadata.version('bitsandbytes')}, {where}"


def require(quantize: str) -> None:
    """An error where what it needs is not installed."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"quantize={quantize} needs the package {name}, which is not installed: {INSTALL}"
            )


def config_for(quantize: str, dtype: torch.dtype) -> Any:
    """transformers' configuration: the linear layers but the head in 8 or 4 bits, everything else
    and all products in `dtype`.
    """
    check_quantize(quantize)
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(
            f"quantize={quantize} keeps two digits of a weight or less, and {dtype} would compute "
            "with them to 15: use float32 or bfloat16"
        )
    require(quantize)
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantized(model: Any) -> str | None:
    """How the weights of a model are stored: 8bit or 4bit by bitsandbytes, the name of another
    method, or None for plain weights.
    """
    if getattr(model, "is_loaded_in_8bit", False):
        return "8bit"
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return (
        None if config is None else str(getattr(config.quant_method, "value", config.quant_method))
    )


def left_whole(model: nn.Module) -> str | None:
    """What is to be known of a quantised model that keeps most of its weights whole: experts that
    are one tensor, not linear layers, stay as they are. None where there are none.
    """
    experts = [p for p in model.parameters() if p.dim() >= 3 and p.is_floating_point()]
    if not experts:
        return None
    count = sum(p.numel() for p in experts)
    dtype = str(experts[0].dtype).removeprefix("torch.")
    return (
        f"{count:,} weights of its experts are no linear layers and stay in {dtype} "
        f"({sum(p.nbytes for p in experts) / 2**30:.2f} GiB). If memory is short, serve the model "
        "(vllm serve, teacher=server:URL), or keep it on the CPU while it does not score "
        "(offload: true)"
    )


def same_when_training(model: nn.Module) -> None:
    """Makes what a quantised layer computes the same in training and in sampling, and of each token
    by itself.
    """
    for layer in _layers(model):
        if _bits(layer) == 8:
            layer.__class__ = _weight_only()
        # in eval mode on some CPUs it would round its weights again, for good, to a form without a
        # gradient
        else:
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                raise UserError(
                    "this 4-bit model has run on the CPU before, which packed its weights into a "
                    "form that gradients cannot pass: give its name instead of the object"
                )
            layer.support_avx512bf16_for_cpu = False


def _layers(model: nn.Module) -> list[Any]:
    """The linear layers whose weights bitsandbytes holds."""
    return [module for module in model.modules() if _bits(module)]


def _bits(module: nn.Module) -> int:
    """8 or 4 for a layer of bitsandbytes, 0 for any other; told by its own weight, as no package
    need be there to ask.
    """
    return {"Int8Params": 8, "Params4bit": 4}.get(
        type(module._parameters.get("weight")).__name__, 0
    )


class _Product(torch.autograd.Function):
    """x @ W.T for W = rows [out, in] int8 * scale [out] / 127; rows are widened for the product
    alone, forward and backward.

    int8 is exact in every wider type and the scale is applied in float32, so the weights are not
    rounded a second time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(rows, scale)
        return ((x @ rows.to(x.dtype).T) * (scale / 127)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, scale = ctx.saved_tensors
        return (grad * (scale / 127)).to(grad.dtype) @ rows.to(grad.dtype), None, None


def _scale(layer: Any) -> Tensor:
    """[out]: the largest size of a weight in each row of an 8-bit layer."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


@cache
def _weight_only() -> type:
    """An 8-bit layer that rounds weights only.

    LLM.int8() rounds activations too, and keeps those columns whole in which any token of the batch
    is large: a token's score would depend on what else is in its micro-batch, and on a CPU the
    student would not train the distribution that it sampled from.
    """
    from bitsandbytes.nn import Linear8bitLt

    class WeightOnly8bit(Linear8bitLt):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            y = _Product.apply(x, self.weight.data, _scale(self))
            return y if self.bias is None else y + self.bias.to(y.dtype)

    return WeightOnly8bit


def tensor_slots(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """(owner, attribute) of every tensor that a model holds: parameters, buffers, and what
    bitsandbytes keeps beside its weights.

    Tied weights come once for each place that names them.
    """
    for module in model.modules():
        yield from ((p, "data") for p in module._parameters.values() if p is not None)
        yield from ((module, name) for name, b in module._buffers.items() if b is not None)
        if bits := _bits(module):
            weight: Any = module.weight
            beside = (
                [weight, module.state]
                if bits == 8
                else [weight.quant_state, getattr(weight.quant_state, "state2", None)]
            )
            names = ("CB", "SCB") if bits == 8 else ("absmax", "code", "offset")
            yield from (
                (owner, n)
                for owner in beside
                for n in names
                if isinstance(getattr(owner, n, None), Tensor)
            )


def size_of(model: nn.Module) -> int:
    """Bytes that a model's weights take, what is shared once."""
    held = {(t := getattr(owner, name)).data_ptr(): t.nbytes for owner, name in tensor_slots(model)}
    return sum(held.values())


@torch.no_grad()
def merged(model: Any) -> Any:
    """A peft model as a plain one: adapters added to their weights, quantised ones made whole
    first, so that it computes what was trained.

    Whole weights are gathered on the CPU, one layer at a time: where the quantised model was needed
    they may not fit the device.
    """
    base = model.get_base_model()
    if not _layers(base):
        return model.merge_and_unload()
    whole: dict[str, nn.Linear] = {}
    for name, layer in list(base.named_modules()):
        if not _bits(layer):
            continue
        outside = name.removesuffix(".base_layer")
        weight = _dequantised(layer)
        adapted = base.get_submodule(outside)
        if adapted is not layer:
            weight = weight + sum(
                adapted.get_delta_weight(adapter) for adapter in adapted.active_adapters
            )
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight = nn.Parameter(weight.to("cpu", base.dtype))
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to("cpu", base.dtype))
        whole[outside] = linear
    for module in base.modules():
        if hasattr(module, "base_layer") and not _bits(module.base_layer):
            module.merge()  # an adapter on a layer that was left whole
    plain = model.unload()
    for name, linear in whole.items():
        plain.set_submodule(name, linear)
    plain.hf_quantizer.remove_quantization_config(plain)
    plain.is_loaded_in_8bit = plain.is_loaded_in_4bit = False
    return plain.to("cpu")


def _dequantised(layer: Any) -> Tensor:
    """[out, in] float32."""
    if _bits(layer) == 8:
        return layer.weight.data * (_scale(layer) / 127)[:, None]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
