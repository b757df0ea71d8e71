"""From a `Run` to a `Job`: what can be refused without a model is refused before one is loaded;
then every model is opened once, and the job assembled.
"""

from __future__ import annotations

from opdkit.models.device import device_of
from opdkit.run.ask import ask
from opdkit.run.assemble import assemble
from opdkit.run.open import Given
from opdkit.run.opened import open_models
from opdkit.run.resolve import on_device
from opdkit.run.settings import Run
from opdkit.train import checkpoint as checkpoints
from opdkit.train.checkpoint import State
from opdkit.train.job import Job


def prepare(
    run: Run, given: Given = Given(), *, resume: bool = False, overwrite: bool = False
) -> tuple[Job, State]:
    """A run checked and built, and where it starts: at its newest checkpoint with `resume`.

    `overwrite` removes what an earlier run left in the folder, once everything is known to load.
    """
    run = on_device(run, device_of(run.device).startswith("cuda"))
    asked = ask(run, given)
    checkpoint = checkpoints.newest(run.folder) if resume else None
    opened = open_models(run, given, asked.method, checkpoint)
    return assemble(run, given, asked, opened, checkpoint, overwrite)
