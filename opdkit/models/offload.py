"""Models that take turns on the device: a frozen one waits on the CPU and is there only while it is
used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.quantize import quantized, tensor_slots
from opdkit.objective.head import Head


class Offloaded:
    """`with offloaded():` puts a frozen model's body on the device and takes it away again,
    whatever happens inside.

    The head stays on the device, as it is read after the model's own passes; with it an embedding
    that is tied to it. The copies on the CPU are kept, pinned where the device is a GPU: leaving
    drops the device's copies and copies nothing back.
    """

    def __init__(
        self,
        model: Any,
        head: Head,
        device: torch.device | str,
        fetch: Callable[[Tensor], Tensor] | None = None,
    ):
        self.device = torch.device(device)
        self.fetch = fetch or (lambda tensor: tensor.to(self.device, non_blocking=True))
        self.depth = 0
        self.kept: list[tuple[Any, str, Tensor]] = []  # owner, attribute, the copy on the CPU
        held = quantized(model)
        if held not in (None, "8bit", "4bit"):
            raise UserError(
                "offload moves plain weights and those of bitsandbytes; "
                f"{model.config._name_or_path} is stored as {held}, whose layers keep tensors of "
                "their own. Set offload: false, or use quantize with the unquantised checkpoint"
            )
        stay = {t.data_ptr() for t in (head.weight, head.bias) if t is not None}
        copies: dict[tuple[Any, ...], Tensor] = {}
        for owner, name in list(tensor_slots(model)):
            tensor = getattr(owner, name)
            if tensor.data_ptr() in stay:
                continue
            key = _identity(tensor)
            if key not in copies:
                copies[key] = (
                    tensor.cpu().pin_memory() if self.device.type == "cuda" else tensor.cpu()
                )
            self.kept.append((owner, name, copies[key]))
        self._leave()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.depth += 1
        try:
            if self.depth == 1:
                self._enter()
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self._leave()

    def _enter(self) -> None:
        here: dict[tuple[Any, ...], Tensor] = {}
        for owner, name, kept in self.kept:
            key = _identity(kept)
            if key not in here:
                here[key] = self.fetch(kept)
            setattr(owner, name, here[key])

    def _leave(self) -> None:
        for owner, name, kept in self.kept:
            setattr(owner, name, kept)
        if self.device.type == "cuda":
            # what asks the device how much is free, as the sampler's cache does, must find it free
            torch.cuda.empty_cache()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


@contextmanager
def enough_memory(doing: str, advice: str) -> Iterator[None]:
    """A device that runs out of memory, as advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory while {doing}: {str(error).splitlines()[0]}\n{advice} (docs/memory.md)"
        ) from error


TEACHER_ADVICE = (
    "Keep the teacher on the CPU and only bring it to the GPU to score: offload: true; or store it "
    "in fewer bits: quantize: 8bit or 4bit (teacher: {kind: local, model: MODEL, offload: true, "
    "quantize: 4bit})"
)
STUDENT_ADVICE = (
    "Train adapters on a frozen student in 4 bits (lora: {quantize: 4bit}), set "
    "gradient_checkpointing=true, lower micro_batch_tokens, or keep the teachers on the CPU while "
    "they do not score (offload: true)"
)
