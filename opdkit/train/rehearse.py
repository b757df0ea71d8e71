"""What is written last is tried first: a student that could not be saved, or would be saved as
another model, is found before the first step.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opdkit.base.errors import UserError
from opdkit.models.precision import computing
from opdkit.models.quantize import quantized

# of a generation_config: they say how to draw, which nobody does with do_sample=false
DRAWN = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
PROBED = 16  # tokens that the probe of a merge is read at
APART = 0.1  # share of the adapters' effect that rounding may change, many times what it does


def rehearse(model: Any, tokenizer: Any) -> None:
    """Writes all that is saved of a student but its weights, into a folder that goes away; an error
    where that fails.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _mend_generation_config(base)
    try:
        with tempfile.TemporaryDirectory(prefix="opdkit-") as folder:
            base.config.save_pretrained(folder)
            if getattr(base, "generation_config", None) is not None and base.can_generate():
                base.generation_config.save_pretrained(folder)
            if base is not model:
                model.save_pretrained(folder, safe_serialization=True)
            elif quantized(base) is None:
                base.save_pretrained(folder, state_dict={})
            tokenizer.save_pretrained(folder)
    # whatever transformers, peft and safetensors raise for what they do not write
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the student could not be saved at the end ({type(error).__name__}: {reason}), which "
            "was tried before the first step. Mend the model's configuration or its tokenizer, so "
            "that save_pretrained writes both, then start again"
        ) from error
    if base is not model:
        check_merge(model)


def _mend_generation_config(model: Any) -> None:
    """Takes out of a generation_config what keeps it from being saved and says nothing."""
    config = getattr(model, "generation_config", None)
    if config is None or config.do_sample:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        usual = type(config)()
        idle = [n for n in DRAWN if getattr(config, n, None) not in (None, getattr(usual, n, None))]
        for name in idle:
            setattr(config, name, None)
        print(
            f"opdkit: the student's generation_config says do_sample=false and sets "
            f"{', '.join(idle) or 'what transformers refuses'}, with which it cannot be saved: the "
            "saved model's says nothing of these",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------------------- merged adapters


@torch.no_grad()
def check_merge(model: Any) -> None:
    """An error where a model with adapters would compute something else once they are merged.

    New adapters change nothing, so one of each kind of layer is given weights for the time of the
    probe; afterwards every weight has the same bits as before.
    """
    base = model.get_base_model()
    shared = {id(p) for p in _shared(base)}
    tied = sorted(name for name, layer in _adapted(base) if id(_weight(layer)) in shared)
    if tied:
        raise UserError(
            f"lora.targets adapts {', '.join(tied)}, whose weight is that of another layer too "
            "(tied embeddings): merged at the end, the adapter would change both, and another "
            "model would be saved than was trained. Leave embedding and head out of lora.targets "
            "(all-linear does), or untie them first and save the model so"
        )
    if quantized(base):
        return
    first = {name.rpartition(".")[2]: layer for name, layer in reversed(_adapted(base))}
    was = [module for module in model.modules() if module.training]
    model.eval()
    with _kept(first.values()):
        plain = _log_probs(model)
        for layer in first.values():
            _fill(layer)
        trained = _log_probs(model)
        for layer in first.values():
            layer.merge()
        merged = _log_probs(model)
        for layer in first.values():
            layer.unmerge()
    for module in was:
        module.training = True
    effect, apart = (trained - plain).abs().mean(), (trained - merged).abs().mean()
    if not bool(apart <= APART * effect):
        raise UserError(
            f"once merged, adapters on {', '.join(sorted(first))} compute another model: log-probs "
            f"differ by {apart.item():.3g} nats from what trains, where the adapters change "
            f"{effect.item():.3g}. Leave out of lora.targets the layers that are not plain linear "
            "ones"
        )


def _adapted(base: nn.Module) -> list[tuple[str, Any]]:
    """Layers with adapters, by name."""
    return [(name, m) for name, m in base.named_modules() if hasattr(m, "get_base_layer")]


def _shared(base: nn.Module) -> list[nn.Parameter]:
    """Parameters that more than one layer has."""
    seen: dict[int, tuple[nn.Parameter, int]] = {}
    for module in base.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = parameter, seen.get(id(parameter), (parameter, 0))[1] + 1
    return [parameter for parameter, count in seen.values() if count > 1]


def _weight(layer: Any) -> Tensor:
    """[...]: what an adapter is added to: a layer's weight, or of experts one of their tensors."""
    found: Tensor = (
        layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    )
    return found


def _fill(layer: Any) -> None:
    """Weights for the second matrix of an adapter, which starts at zero: as large an effect as the
    layer's own.
    """
    generator = torch.Generator().manual_seed(0)
    size = _weight(layer).float().std()
    for part in (layer.lora_B, layer.lora_embedding_B):
        for inner in part.values():
            weight = inner.weight if hasattr(inner, "weight") else inner
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            weight.data.copy_(drawn * size * 4)


@contextmanager
def _kept(layers: Any) -> Iterator[None]:
    """Behind it every weight of the layers has the bits that it had before."""
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        for parameter in layer.parameters():
            held[id(parameter)] = parameter.data, parameter.data.clone()
    try:
        yield
    finally:
        for now, before in held.values():
            now.copy_(before)


def _log_probs(model: Any) -> Tensor:
    """[PROBED, V] log-probs of the student on its first few token ids."""
    device = next(model.parameters()).device
    ids = torch.arange(PROBED, device=device)[None] % model.get_base_model().config.vocab_size
    with computing(model):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)
