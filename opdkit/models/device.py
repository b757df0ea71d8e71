"""The device that models are on."""

from __future__ import annotations

import torch

from opdkit.base.errors import UserError


def device_of(name: str) -> str:
    """`auto` as a GPU where there is one, else the CPU; any other name as it is, once it is known
    to work.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "meta":
        raise UserError(
            "device=meta holds no numbers, so nothing can be computed there: set device=auto, "
            "which takes a GPU where there is one and else the CPU"
        )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0]}): set "
            "device=auto, which takes a GPU where there is one and else the CPU"
        ) from error
    return name
