"""What a device can hold and how fast it is: the one at hand, one of a table, or one given in
numbers.
"""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass, replace
from typing import Any

from opdkit.base.errors import UserError, nearest

GIB = 2**30
CPU_MEMORY = 16 * GIB  # where the system does not say
CORE_TFLOPS = 0.06  # of one CPU core with 256-bit vectors, float32
CPU_BANDWIDTH = 0.02
WIDER = 16  # a GPU without a table entry: 16-bit products over float32 ones (H100: 15, A100: 16)


@dataclass(frozen=True)
class Device:
    """Peaks from data sheets. A rate is 0 where it is not known."""

    name: str
    memory: int  # bytes that a program sees
    tflops: float  # bfloat16 matrix products, dense, 10^12 operations per second
    tflops32: float  # float32 ones, without TF32
    bandwidth: float  # of its memory, 10^12 bytes per second
    gpu: bool = True


KNOWN = {
    "h200": Device("H200", int(139.8 * GIB), 989, 67, 4.8),
    "h100": Device("H100", int(79.1 * GIB), 989, 67, 3.35),
    "a100": Device("A100", int(79.1 * GIB), 312, 19.5, 2.04),
    "a100-40gb": Device("A100-40GB", int(39.4 * GIB), 312, 19.5, 1.56),
    "l40s": Device("L40S", int(44.4 * GIB), 362, 91.6, 0.86),
    "l4": Device("L4", int(22.0 * GIB), 121, 30.3, 0.3),
}


def find_device(
    name: str | None = None,
    *,
    memory: str | None = None,
    tflops: float | None = None,
    bandwidth: str | None = None,
    setting: str = "auto",
) -> Device:
    """The device that is meant.

    Numbers replace those of the table, or stand for a GPU that is in none; `setting` is the run's.
    """
    if tflops is not None and not 0 < tflops < math.inf:
        raise UserError(
            f"--device-tflops={tflops} must be positive and finite: it is the peak of the device's "
            "matrix products, such as 989"
        )
    given: dict[str, Any] = {
        "memory": None if memory is None else int(quantity(memory, 1e9, "--device-memory 80GB")),
        "tflops": tflops,
        "tflops32": None if tflops is None else tflops / WIDER,
        "bandwidth": None
        if bandwidth is None
        else quantity(bandwidth, 1e12, "--device-bandwidth 3.35TB/s") / 1e12,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    if name is not None:
        if name.lower() not in (*KNOWN, "cpu"):
            raise UserError(
                f"no device {name!r} in the table{nearest(name.lower(), [*KNOWN, 'cpu'])}: use one "
                f"of {', '.join(KNOWN)} or cpu, or give --device-memory 80GB --device-tflops 400 "
                "--device-bandwidth 3.35TB/s"
            )
        return replace(KNOWN[name.lower()] if name.lower() in KNOWN else cpu(), **changes)
    found = at_hand(setting)
    if not changes or found.gpu:
        return replace(found, **changes)
    if memory is None:
        raise UserError(
            "a GPU that is not here is described by its memory at least: add --device-memory, such "
            "as 80GB"
        )
    return replace(Device("GPU as given", 0, 0, 0, 0), **changes)


def at_hand(setting: str = "auto") -> Device:
    """The device that the run would take here."""
    import torch

    if setting == "cpu" or not torch.cuda.is_available():
        return cpu()
    properties = torch.cuda.get_device_properties(
        torch.device(setting if setting != "auto" else "cuda")
    )
    words = re.split(r"[\s_-]+", properties.name.lower())
    same = next((d for key, d in KNOWN.items() if key in words), Device("", 0, 0, 0, 0))
    return replace(same, name=properties.name, memory=properties.total_memory)


def cpu() -> Device:
    """This machine's processor, by rules of thumb."""
    cores = os.cpu_count() or 1
    memory = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if sys.platform == "linux"
        else CPU_MEMORY
    )
    return Device(
        f"CPU with {cores} cores",
        memory,
        CORE_TFLOPS * cores,
        CORE_TFLOPS * cores,
        CPU_BANDWIDTH,
        gpu=False,
    )


def quantity(text: str, scale: float, example: str) -> float:
    """`80GB`, `80GiB`, `3.35TB/s`, `300 GB/s` in bytes; a bare number is in `scale`."""
    found = re.fullmatch(
        r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([GMT])(i?)B(?:/s)?)?\s*", text, re.IGNORECASE
    )
    if not found:
        raise UserError(f"{text!r} is no amount: write it as in {example}")
    number, prefix, binary = float(found[1]), found[2], found[3]
    if prefix is None:
        return number * scale
    power = "MGT".index(prefix.upper()) + 2
    return number * (1024**power if binary else 1000**power)
