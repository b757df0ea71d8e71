"""A model spread over the processes of a run: each holds a part of every matrix, and has the whole
of a layer only while that layer computes (PyTorch's FSDP2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from opdkit.models.body import decoder_of, layers_of
from opdkit.objective.head import Head
from opdkit.objective.parts import whole

Thing = TypeVar("Thing")

SHARDED = "opdkit_devices"  # attribute of a model that is spread over these


def shard(model: Any, devices: Any) -> Any:
    """The model, spread in place over a mesh of devices, one per process; as it is where that is
    None.

    Gradients are summed over the processes, not averaged: what a term is divided by counts the
    tokens of all of them.
    """
    if devices is None:
        return model
    from torch.distributed.fsdp import FSDPModule, fully_shard

    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    for module in (*layers_of(model), decoder_of(model)):
        fully_shard(module, mesh=devices, reshard_after_forward=True)
    if tied:  # the body has another weight now, and the head still its former one
        head.weight = model.get_input_embeddings().weight
    else:
        fully_shard(head, mesh=devices)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # both, and of every module: otherwise gradients are a mean over the processes
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, SHARDED, devices)
    return model


def shard_frozen(model: Any, devices: Any) -> Any:
    """A model that does not learn, spread in place as `shard` does it; but its head, and an
    embedding that is tied to it, are whole on each process, which reads whole vocabularies with it.
    """
    if devices is None:
        return model
    from torch.distributed.fsdp import fully_shard

    head = model.get_output_embeddings().to(devices.device_type)
    for module in (*layers_of(model), decoder_of(model)):
        kept = set(head.parameters())
        fully_shard(module, mesh=devices, reshard_after_forward=True, ignored_params=kept)
    setattr(model, SHARDED, devices)
    return model


def level(model: Any, parts: Sequence[Thing], idle: Thing) -> list[Thing]:
    """Parts of work, one forward pass each, as many on every process as the most that one has: the
    passes of a model that is spread wait for each other. What is added is `idle`.
    """
    if not is_spread(model):
        return list(parts)
    devices = getattr(model, SHARDED)
    import torch.distributed as dist

    most = torch.tensor(len(parts), device=devices.device_type)
    dist.all_reduce(most, dist.ReduceOp.MAX, devices.get_group())
    return [*parts, *[idle] * (int(most) - len(parts))]


def is_spread(model: Any) -> bool:
    """Whether a model is spread over processes."""
    return getattr(model, SHARDED, None) is not None


def whole_head(head: Head) -> Head:
    """A head with its weight put together: it is asked for on all processes at once."""
    return replace(head, weight=whole(head.weight), bias=whole(head.bias))


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """Within it every process has the whole model, and its passes ask the others for nothing; all
    of them enter it at once. A model that is not spread is whole already.
    """
    if not is_spread(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    if tied:
        spread, head.weight = head.weight, embedding.weight
    try:
        yield
    finally:
        if tied:
            head.weight = spread
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


class WholeHead:
    """A head of which each process holds a part, as a whole for one optimiser step: put together
    once, and its gradient given back to the parts.
    """

    def __init__(self) -> None:
        self.version = -1
        self.leaf: Tensor | None = None

    def of(self, weight: Tensor, version: int) -> Tensor:
        """[V', H]: the weight after `version` optimiser steps."""
        if self.leaf is None or self.version != version:
            self.leaf = whole(weight).detach().requires_grad_(weight.requires_grad)
            self.version = version
        return self.leaf

    def give_back(self, weight: Any) -> None:
        """Adds what the processes have learnt of the whole to the gradient of a part."""
        # without a gradient there was no pass, on any of them: the weight stays as it is
        if self.leaf is None or self.leaf.grad is None:
            return
        from torch.distributed.tensor import DTensor, Partial

        summed = DTensor.from_local(self.leaf.grad, weight.device_mesh, [Partial()])
        part = summed.redistribute(placements=weight.placements)
        weight.grad = part if weight.grad is None else weight.grad + part
        self.leaf.grad = None


def reshard(model: Any) -> None:
    """Every process holds its parts alone, as after a backward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
