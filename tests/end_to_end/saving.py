"""What each of several processes does in a test of checkpoints: runs, one after the other.

    torchrun --standalone --nproc-per-node N -m tests.end_to_end.saving CASES

CASES is JSON: a list of {"values": of a run, "resume": whether it goes on, "slow": seconds that
each process waits before it writes its shards, "kill": the rank that is killed in that time at the
second checkpoint, "full": the rank that finds no space}.
"""

from __future__ import annotations

import json
import os
import signal
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


def on(count: int, cases: list[dict[str, Any]], folder: Path) -> subprocess.CompletedProcess[str]:
    """Cases in so many processes."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc-per-node={count}", "-m", "tests.end_to_end.saving", str(path)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, timeout=600, capture_output=True, text=True, cwd=ROOT, env=threads
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
