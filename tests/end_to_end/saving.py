"""What each of several processes does in a test of checkpoints: runs, one after the other.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=HOST MASTER_PORT=PORT python -m tests.end_to_end.saving CASES

CASES is JSON: a list of {"values": of a run, "resume": whether it goes on, "slow": seconds that
each process waits before it writes its shards, "kill": the rank that is killed in that time at the
second checkpoint, "full": the rank that finds no space}.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from opdkit.run.build import prepare
from opdkit.run.export import write_final
from opdkit.run.settings import make_run
from opdkit.train import shards
from opdkit.train.loop import train
from opdkit.train.mesh import ALONE, Mesh, joined

ROOT = Path(__file__).parents[2]


def full(*_: Any) -> None:
    raise OSError("no space left")


def done(case: dict[str, Any], mesh: Mesh = ALONE) -> None:
    """A run, to its end."""
    run = make_run(case["values"])
    job, state = prepare(run, resume=case.get("resume", False), mesh=mesh)
    written = shards.write

    def slowly(checkpoint: Path, *rest: Any) -> None:
        time.sleep(case.get("slow", 0))
        if case.get("kill") == mesh.rank and checkpoint.name.endswith("checkpoint-2"):
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.MonkeyPatch.context() as patch:
            if case.get("full") == mesh.rank:
                patch.setattr(dcp.FileSystemWriter, "write_data", full)
            written(checkpoint, *rest)

    shards.write = slowly
    try:
        with job.recorder.trackers:
            train(job, state)
    finally:
        shards.write = written
    write_final(run.folder / "model", job)


def main(cases: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as mesh:
        for case in json.loads(cases.read_text()):
            done(case, mesh)


def on(count: int, cases: list[dict[str, Any]], folder: Path) -> tuple[int, str]:
    """Cases in so many processes, all of which end with the first that fails; their status, and
    what they said.
    """
    path, said = folder / "cases.json", folder / "said"
    path.write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    told = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tests.end_to_end.saving", str(path)]
    with said.open("w") as log:
        running = [
            subprocess.Popen(
                command,
                stderr=log,
                stdout=log,
                cwd=ROOT,
                env={**os.environ, **told, "RANK": str(rank), "WORLD_SIZE": str(count)},
            )
            for rank in range(count)
        ]
    end = time.monotonic() + 300
    try:
        while any(p.poll() is None for p in running) and time.monotonic() < end:
            if any(p.poll() for p in running):
                end = min(end, time.monotonic() + 20)
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return max(abs(p.returncode) for p in running), said.read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
