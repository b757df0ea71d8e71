"""What a machine offers to several processes: devices and the links between them, how processes
find and tell each other, and the limits that they meet.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

GIB = 2**30
QUICK = 5  # seconds that another program is waited for
STARTS = 60  # and two processes, which load torch first: 2 on an idle machine
SHARED, FILES, DISK = 1 * GIB, 4096, 50 * GIB  # below which a limit is short
# what a scheduler or a launcher may have set, and what that means
SAYS = {
    "WORLD_SIZE": "processes of the run",
    "RANK": "which of them this is, from 0",
    "LOCAL_RANK": "which of this machine's: its GPU",
    "LOCAL_WORLD_SIZE": "processes on this machine",
    "MASTER_ADDR": "where the first of them is",
    "MASTER_PORT": "its port",
    "SLURM_JOB_ID": "this is inside a job of SLURM",
    "SLURM_JOB_NODELIST": "its machines",
    "SLURM_NNODES": "their number",
    "SLURM_NTASKS": "processes that srun starts, of which each may start others",
    "SLURM_PROCID": "which of these this is",
    "SLURM_GPUS_ON_NODE": "GPUs of this machine that the job has",
    "SLURM_RESTART_COUNT": "how often the job was put back: above 0 it goes on with --resume",
    "RAY_ADDRESS": "the Ray cluster that cluster=ray joins",
    "CUDA_VISIBLE_DEVICES": "the GPUs that processes see",
    "GLOO_SOCKET_IFNAME": "the network by which small things are told",
    "NCCL_SOCKET_IFNAME": "the network by which GPUs find each other",
    "NCCL_IB_DISABLE": "1: GPUs of other machines are reached without InfiniBand",
    "NCCL_P2P_DISABLE": "1: GPUs of this machine are reached through its memory",
}


def line(name: str, text: str, advice: str = "") -> str:
    """What there is, and below it what to do about it."""
    return f"{name:<13} {text}" + (f"\n{'':<13} -> {advice}" if advice else "")


@contextmanager
def telling() -> Iterator[list[str]]:
    """Two processes try to tell each other a number while the body runs; at its end a line says how
    long that takes.
    """
    said: list[str] = []
    with TemporaryDirectory(prefix="opdkit-") as folder:
        command = [sys.executable, "-m", "opdkit.run.round_trip"]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        pair = [
            subprocess.Popen([*command, str(i), f"{folder}/store"], env=alone, **out)  # type: ignore[call-overload]
            for i in range(2)
        ]
        try:
            yield said
            said.append(_told(pair))
        finally:
            for process in pair:
                process.kill()
                process.wait()


def _told(pair: list[subprocess.Popen[str]]) -> str:
    advice = (
        "processes of a run tell each other this way: see that the name of this machine resolves "
        "(hostname -i), or name a network, such as GLOO_SOCKET_IFNAME=lo"
    )
    try:
        ends = [process.communicate(timeout=STARTS) for process in pair]
    except subprocess.TimeoutExpired:
        return line("round trip", f"two processes heard nothing in {STARTS} s", advice)
    found = re.fullmatch(r"([\d.e-]+) ([\d.e-]+)\s*", ends[0][0])
    if not found:
        errors = [x for _, error in ends for x in error.strip().splitlines()]
        last = errors[-1][:200] if errors else "no reason given"
        return line("round trip", f"two processes could not tell each other: {last}", advice)
    small, large = map(float, found.groups())
    return line(
        "round trip",
        f"two processes here have a number's sum in {small:.2g} ms, that of 4 MiB in {large:.2g} "
        "ms (gloo)",
    )


def backends() -> str:
    """By what processes tell each other, and what is not there."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return line("distributed", "none in this build of torch", "install one of pytorch.org's")
    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available():
        with suppress(Exception):  # a build with it, and no driver
            found.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
    advice = ""
    if torch.cuda.is_available() and not dist.is_nccl_available():
        advice = "several GPUs need NCCL: install a build of torch for CUDA"
    elif "gloo" not in found:
        advice = "several processes need gloo for what is small: install a build of pytorch.org's"
    return line("distributed", ", ".join(found) or "no backend", advice)


def gpus(properties: list[tuple[str, int, str]], free: Mapping[str, int]) -> list[str]:
    """A line for each GPU: its name, bytes and UUID, and what of the bytes is free."""
    lines = []
    for i, (name, size, uuid) in enumerate(properties):
        text, left = f"{name}, {size / GIB:.0f} GiB", free.get(uuid)
        advice = ""
        if left is not None:
            text += f", {left / GIB:.0f} GiB free"
            if left < 0.9 * size:
                advice = "something else holds the rest: nvidia-smi says what"
        lines.append(line(f"gpu {i}", text, advice))
    return lines


def free_memory() -> dict[str, int]:
    """Bytes that are free on each GPU, by its UUID; nothing where nvidia-smi does not say."""
    said = _output("nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits")
    rows = [text.split(",") for text in said.splitlines()]
    return {r[0].strip(): int(r[1]) * 2**20 for r in rows if len(r) == 2 and r[1].strip().isdigit()}


def links(topology: str) -> str:
    """How the GPUs of a machine reach each other, by the table of `nvidia-smi topo -m`."""
    rows = [text.split("\t") for text in topology.splitlines() if text.startswith("GPU")]
    names = [row[0].strip() for row in rows]
    seen = [
        row[1 + j].strip()
        for i, row in enumerate(rows)
        for j in range(i + 1, len(names))
        if len(row) > 1 + j
    ]
    if not seen:
        return ""
    nvlink = [word for word in seen if word.startswith("NV")]
    if len(nvlink) == len(seen):
        count = ", ".join(sorted({word[2:] for word in nvlink}))
        return line("links", f"NVLink between all {len(names)} GPUs, {count} links each")
    slow = sorted(set(seen) - set(nvlink))
    text = f"{len(nvlink)} of {len(seen)} pairs of GPUs by NVLink, others by {', '.join(slow)}"
    advice = (
        "without NVLink each pass of a student that is spread takes much longer: try adapters "
        "(lora.r=32), or fewer processes and vLLM servers on the other GPUs (opdkit train --dry-run"
        " --device 8xNAME --device-link 25GB/s says what is best)"
    )
    return line("links", text, advice)


def topology() -> str:
    return _output("nvidia-smi", "topo", "-m")


def network() -> str:
    """Cards for other machines."""
    import resource

    try:
        cards = sorted(path.name for path in Path("/sys/class/infiniband").iterdir())
    except OSError:
        cards = []
    if not cards:
        return line("network", "no InfiniBand card: other machines are reached by TCP")
    most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    advice = "" if most == resource.RLIM_INFINITY else "InfiniBand needs ulimit -l unlimited"
    return line("network", f"InfiniBand {', '.join(cards)}", advice)


def limits(output: str | Path) -> list[str]:
    """Of shared memory, of open files, of the disk where a run would write."""
    lines = []
    with suppress(OSError):
        size = shutil.disk_usage("/dev/shm")
        advice = (
            "NCCL, vLLM and Ray pass things on through it: in a container start it with "
            "--shm-size=16g, or --ipc=host"
        )
        text = f"{_size(size.total)}, {_size(size.free)} free (/dev/shm)"
        lines.append(line("shared memory", text, advice if size.free < SHARED else ""))
    with suppress(ImportError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        advice = "sockets and shards are files, and several hundred are open: ulimit -n 65536"
        most = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
        text = f"{soft:,} at once, at most {most}"
        lines.append(line("open files", text, advice if 0 <= soft < FILES else ""))
    folder = Path(output).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    advice = (
        "a checkpoint takes 12 bytes for each weight that learns (96 GB of 8 billion), and the "
        "last one stays until the next is whole: choose another output=DIR, or checkpoint.keep=1"
    )
    lines.append(line("output", f"{_size(free)} free in {there}", advice if free < DISK else ""))
    return lines


def launched(environment: Mapping[str, str]) -> list[str]:
    """What launchers and schedulers have set, and what that means."""
    found = {name: environment[name] for name in SAYS if environment.get(name)}
    if not found:
        return [line("launched", "by no launcher: opdkit train --nproc N starts N processes here")]
    lines = [
        line("launched" if not i else "", f"{name}={value}: {SAYS[name]}")
        for i, (name, value) in enumerate(found.items())
    ]
    size = found.get("WORLD_SIZE", "1")
    ready = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(found)
    if size.isdigit() and int(size) > 1 and not ready:
        lines.append(
            line(
                "",
                "of several processes, and how to find the others is not said",
                "set RANK, MASTER_ADDR and MASTER_PORT as torchrun does, or unset WORLD_SIZE",
            )
        )
    elif size.isdigit() and int(size) > 1:
        text = f"opdkit train here is one of {size} and waits for the others"
        lines.append(line("", text, "for a run of its own unset WORLD_SIZE"))
    elif "SLURM_JOB_ID" in found:
        text = "srun alone tells opdkit nothing of the other processes"
        lines.append(line("", text, "start torchrun on each machine, as `opdkit slurm` writes it"))
    return lines


def _size(size: float) -> str:
    return f"{size / GIB:.0f} GiB" if size >= 10 * GIB else f"{size / 2**20:,.0f} MiB"


def _output(*command: str) -> str:
    """What a program prints; nothing, where it is not there or fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=QUICK, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
