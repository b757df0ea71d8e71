"""From a `Run` to a `Job`: what can be refused without a model is refused before one is loaded;
then every model is opened once, and the job assembled.
"""

from __future__ import annotations

from opdkit.models.device import device_of
from opdkit.run.ask import ask
from opdkit.run.assemble import assemble
from opdkit.run.open import Given
from opdkit.run.opened import open_models
from opdkit.run.resolve import on_device, with_models
from opdkit.run.resume import agreed, record_of
from opdkit.run.settings import Run
from opdkit.train import checkpoint as checkpoints
from opdkit.train.checkpoint import State
from opdkit.train.job import Job
from opdkit.train.mesh import ALONE, Mesh


def prepare(
    run: Run,
    given: Given = Given(),
    *,
    resume: bool = False,
    allow_changes: bool = False,
    mesh: Mesh = ALONE,
) -> tuple[Job, State]:
    """A run checked and built, and where it starts: at its newest checkpoint with `resume`, which
    must be of the same settings and data unless `allow_changes`. `mesh`: the processes that share
    it.
    """
    run = on_device(run, device_of(run.device).startswith("cuda"))
    run = with_models(run, given.method or run.method_spec.load())
    asked = ask(run, given)
    checkpoint = checkpoints.newest(run.folder, mesh) if resume else None
    record = agreed(run, record_of(run, given, asked), checkpoint, allow_changes)
    opened = open_models(run, given, asked.method, checkpoint, mesh.devices)
    return assemble(run, given, asked, opened, checkpoint, record, mesh)
