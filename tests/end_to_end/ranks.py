"""What each of several processes does in a test: the runs of a file, one after the other.

    torchrun --standalone --nproc-per-node N -m tests.end_to_end.ranks CASES OUT

CASES is JSON: {name: values of a run}. The first process writes into OUT, a torch file, of each run
its metrics, the gradient of its first optimiser step and its weights in the end; or its error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from opdkit.base.files import read_lines
from opdkit.models.adapters import has_adapters
from opdkit.objective.parts import whole
from opdkit.run.build import prepare
from opdkit.run.settings import make_run
from opdkit.sampling.kinds import KINDS
from opdkit.train.loop import train
from opdkit.train.mesh import Mesh, joined
from opdkit.train.shards import whole_weights
from tests.common.copy_sampler import CopySettings


def found(values: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """What a run comes to."""
    run = make_run(values)
    job, state = prepare(run, mesh=mesh)
    student, gradients = job.student, dict[str, torch.Tensor]()
    measured = student.gradient_norm

    def noted() -> torch.Tensor:
        norm = measured()
        if not gradients:
            named = student.model.named_parameters()
            gradients.update({n: whole(p.grad).clone() for n, p in named if p.grad is not None})
        return norm

    student.gradient_norm = noted  # type: ignore[method-assign]
    with job.recorder.trackers:
        train(job, state)
    model = student.model
    kept = {n: whole(p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}
    names = sorted(whole_weights(model)) if not has_adapters(model) else []
    lines = read_lines(run.folder / "metrics.jsonl") if mesh.rank == 0 else []
    return {"metrics": lines, "gradients": gradients, "weights": kept, "names": names}


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    every = {}
    with mock.patch.dict(KINDS, copy=CopySettings), joined("cpu") as mesh:
        for name, values in json.loads(cases.read_text()).items():
            every[name] = found(values, mesh)
    if mesh.rank == 0:
        torch.save(every, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
