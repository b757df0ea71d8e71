"""The products of experts, which are one tensor for all of them: in the numbers of all other
products, which autocast does not know to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

USUAL, ROUNDED = "grouped_mm", "opdkit_grouped_mm"  # transformers' names of implementations


def round_experts(model: Any) -> None:
    """The grouped products of a mixture of experts are rounded as autocast rounds those of other
    layers; nothing to do for any other model.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None) != USUAL:
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if any(parameter.dim() >= 3 for parameter in model.parameters()):
        ALL_EXPERTS_FUNCTIONS.register(ROUNDED, _rounded)
        model.set_experts_implementation(ROUNDED)


class _Narrow:
    """A layer of experts whose weights are rounded to a type, its other attributes as they are."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        self._layer, self._dtype = layer, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value


def _rounded(
    layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """[N, H] of states [N, H], by the experts [N, k] of each token and their weights [N, k]."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        layer = _Narrow(layer, torch.get_autocast_dtype(device))
    return grouped_mm_experts_forward(layer, hidden_states, top_k_index, top_k_weights)
