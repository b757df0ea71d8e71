"""In which numbers a model computes: its own, whatever surrounds it.

A model in bfloat16 multiplies bfloat16 matrices and adds up float32: its matrices are rounded for
the products, its vectors (norms, biases) and the states between its layers are not. That holds
whether its weights are stored in bfloat16 or learn in float32, so that a teacher and a student of
equal weights compute equal numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from opdkit.models.experts import round_experts
from opdkit.models.identity import folder_of
from opdkit.objective.parts import is_part
from opdkit.objective.products import narrow

PRODUCTS, HEAD = "opdkit_products", "opdkit_head"  # attributes of a model; a copy keeps them


def compute_in(
    model: Any, products: torch.dtype | None = None, head: torch.dtype | None = None
) -> None:
    """Sets the type that a model's matrices are rounded to for its products, and for those of its
    head; None: the type its weights are stored in, and that of its other products.
    """
    setattr(model, PRODUCTS, products)
    setattr(model, HEAD, head)
    if narrow(products_of(model)):
        round_experts(model)


def products_of(model: Any) -> torch.dtype:
    """The type that a model's matrices are rounded to for its products."""
    stored: torch.dtype = model.get_input_embeddings().weight.dtype
    return getattr(model, PRODUCTS, None) or stored


def head_products_of(model: Any) -> torch.dtype:
    """The type that a model's head and last hidden states are rounded to for their product: never a
    narrower one than for the others.
    """
    products = products_of(model)
    return (getattr(model, HEAD, None) or products) if narrow(products) else products


@contextmanager
def computing(model: Any) -> Iterator[None]:
    """The model's products in its own numbers.

    Within it PyTorch keeps the rounded copies of weights that learn: a sampler enters it around all
    of its passes. Of a model that is spread over processes none are kept, or each would have the
    whole of it once more.
    """
    products, device = products_of(model), next(model.parameters()).device.type
    if not narrow(products):
        with torch.autocast(device, enabled=False):
            yield
        return

    def rounded(module: Any, inputs: Any, states: Tensor) -> Tensor:
        """[B, T, H]: rows of the embedding, rounded as every other matrix, in float32."""
        if (scale := getattr(module, "embed_scale", None)) is None:
            return states.to(products).float()
        # Gemma's are scaled, in the type that they are stored in
        rows = nn.functional.embedding(inputs[0], module.weight).to(products)
        return (rows * (scale.to(products) if isinstance(scale, Tensor) else scale)).float()

    hook = model.get_input_embeddings().register_forward_hook(rounded)
    try:
        kept = not any(is_part(parameter) for parameter in model.parameters())
        with torch.autocast(device, products, cache_enabled=kept):
            yield
    finally:
        hook.remove()


def widen(model: Any, name: str | None = None, head: bool = False) -> None:
    """Norms and biases of a model in 16 bits as float32, in place: as the checkpoint `name` holds
    them, where its files are here. With `head` its weight too, where the checkpoint has more bits.
    """
    last = model.get_output_embeddings()
    named = {key: p for key, p in model.named_parameters() if narrow(p.dtype)}
    vectors = {key for key, parameter in named.items() if parameter.dim() < 2}
    heads = {key for key, p in named.items() if head and p is getattr(last, "weight", None)}
    folder = folder_of(name) if vectors | heads and name is not None else None
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        with safe_open(path, "pt") as file:
            stored |= {key: file.get_tensor(key) for key in (vectors | heads) & set(file.keys())}
    for key in vectors | heads:
        parameter, whole = named[key], stored.get(key, named[key].data)
        if whole.shape == parameter.shape and (key in vectors or not narrow(whole.dtype)):
            parameter.data = whole.to(parameter.device, torch.float32)
