"""What the doctor says of several processes: what programs print, what is set, what is short."""

from __future__ import annotations

import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from opdkit.run import doctor_ranks
from opdkit.run.doctor import doctor
from opdkit.run.doctor_ranks import (
    GIB,
    backends,
    free_memory,
    gpus,
    launched,
    limits,
    links,
    network,
    telling,
)

Usage = namedtuple("Usage", "total used free")


def topology(rows: list[list[str]]) -> str:
    """As `nvidia-smi topo -m` prints it."""
    names = [f"GPU{i}" for i in range(len(rows))]
    head = "\t".join(["\t" + "\t".join(names), "NIC0", "CPU Affinity", "NUMA Affinity"])
    lines = [
        "\t".join([n, *(f" {x} " for x in row), "SYS", "0-31", "0"]) for n, row in zip(names, rows)
    ]
    return "\n".join([head, *lines, "NIC0\tSYS\tSYS\t X", "", "Legend:", "  NV#  = NVLinks"])


def test_links_between_gpus_are_read_off_the_driver_s_table() -> None:
    every = [["X" if i == j else "NV18" for j in range(4)] for i in range(4)]
    assert links(topology(every)) == "links         NVLink between all 4 GPUs, 18 links each"
    pairs = [
        ["X" if i == j else "NV4" if i // 2 == j // 2 else "SYS" for j in range(4)]
        for i in range(4)
    ]
    said = links(topology(pairs))
    assert "2 of 6 pairs of GPUs by NVLink, others by SYS" in said and "-> without NVLink" in said
    assert links(topology([["X"]])) == links("") == ""


def test_a_gpu_that_somebody_else_uses_is_told() -> None:
    found = [("H100", 80 * GIB, "GPU-a"), ("H100", 80 * GIB, "GPU-b"), ("H100", 80 * GIB, "GPU-c")]
    idle, busy, silent = gpus(found, {"GPU-a": 79 * GIB, "GPU-b": 30 * GIB})
    assert idle == "gpu 0         H100, 80 GiB, 79 GiB free"
    assert "30 GiB free\n" in busy and "-> something else holds the rest" in busy
    assert silent == "gpu 2         H100, 80 GiB"


def test_free_memory_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_ranks, "_output", lambda *words: "GPU-a, 1024\nGPU-b, [N/A]\n")
    assert free_memory() == {"GPU-a": GIB}
    monkeypatch.setattr(doctor_ranks, "_output", lambda *words: "")
    assert free_memory() == {}


@pytest.mark.parametrize(
    ("environment", "told", "advice"),
    [
        ({}, "by no launcher", None),
        ({"HOME": "/home/me"}, "by no launcher", None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1: the GPUs", None),
        (
            {"WORLD_SIZE": "2", "RANK": "1"},
            "how to find the others is not said",
            "unset WORLD_SIZE",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "is one of 2 and waits",
            "unset WORLD_SIZE",
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, "SLURM_NNODES=2: their number", "torchrun"),
        (
            {"SLURM_JOB_ID": "7", "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}
            | {"MASTER_PORT": "1", "SLURM_RESTART_COUNT": "1"},
            "SLURM_RESTART_COUNT=1: how often",
            "unset WORLD_SIZE",
        ),
    ],
)
def test_what_launchers_have_set_is_told_with_what_it_means(
    environment: dict[str, str], told: str, advice: str | None
) -> None:
    said = "\n".join(launched(environment))
    assert told in said
    assert ("->" in said) == (advice is not None) and (advice or "") in said


@pytest.mark.parametrize("free", [100 * GIB, GIB // 2])
def test_what_is_short_is_told_with_what_to_do(
    free: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import resource

    seen: list[Any] = []

    def usage(path: Any) -> Usage:
        seen.append(path)
        return Usage(200 * GIB, 0, free)

    files = 65536 if free > GIB else 1024
    monkeypatch.setattr(doctor_ranks.shutil, "disk_usage", usage)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (files, 65536))
    said = limits(tmp_path / "runs/not/yet")
    assert seen == ["/dev/shm", tmp_path]  # where the folder will be made
    short = [text for text in said if "->" in text]
    assert len(said) == 3 and len(short) == (0 if free > GIB else 3)
    if short:
        for text, advice in zip(said, ("--shm-size", "ulimit -n", "output=DIR")):
            assert advice in text


def test_processes_that_cannot_find_each_other_are_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with telling() as told:
        pass
    assert "could not tell each other" in told[0] and "-> processes of a run" in told[0]
    monkeypatch.setattr(doctor_ranks, "STARTS", 0)
    with telling() as told:
        pass
    assert "heard nothing in 0 s" in told[0]


def test_backends_and_networks_are_named() -> None:
    assert re.match(r"distributed   gloo(, NCCL [\d.]+)?$", backends())
    assert network().startswith("network       ")


def test_the_doctor_says_all_of_it(tmp_path: Path) -> None:
    text = doctor(tmp_path)
    said = [line[:13].strip() for line in text.splitlines()]
    wanted = ["distributed", "network", "shared memory", "open files", "output", "launched"]
    wanted.append("round trip")
    assert [name for name in said if name in wanted] == wanted
    found = re.search(r"a number's sum in ([\d.e-]+) ms, that of 4 MiB in ([\d.e-]+) ms", text)
    assert found is not None and 0 < float(found[1]) < float(found[2])
