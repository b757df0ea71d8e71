"""Tensors of which each process of a run holds a part (DTensors of torch.distributed)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_part(tensor: Any) -> bool:
    """Whether this process holds a part of a tensor [...] only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """[...]: a tensor of which each process holds a part, put together on all of them."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def like(weight: Any, values: Tensor) -> Any:
    """[...]: values of the shape of a weight [...], spread as it is; as they are where they are
    spread already or have another shape, or where it is whole.
    """
    if not is_part(weight) or is_part(values) or values.shape != weight.shape:
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(weight.device), weight.device_mesh, weight.placements)
