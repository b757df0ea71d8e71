"""What share of a device's arithmetic a training step used: model-FLOPs utilisation, from the
rollouts that it really had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from opdkit.base.launched import processes
from opdkit.methods.method import Method
from opdkit.models.held import Held
from opdkit.run.plan.devices import Device, find_device
from opdkit.run.plan.models import models_of
from opdkit.run.plan.work import USUAL, Load, peak, phases
from opdkit.run.prompts import as_run
from opdkit.run.resolve import on_device, with_models
from opdkit.run.settings import Run
from opdkit.types import Rollout


@dataclass(frozen=True)
class Use:
    """Operations of each phase over what the device could have done in its seconds; of a CPU the
    peak is a rule of thumb.

    Counted are the operations that the formulas need at the rollouts' mean lengths, not those of
    padding or of layers computed twice.
    """

    run: Run
    method: Method
    models: Sequence[Held]
    device: Device
    devices: int = 1  # that share the rollouts

    def __call__(
        self, rollouts: Sequence[Rollout], sampled: int, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """mfu/sample, mfu/score, mfu/learn, and mfu/step of all that was timed.

        sampled: how many of the rollouts were written in the step.
        """
        n = max(len(rollouts), 1)
        prompt, response = (
            sum(map(len, texts)) / n
            for texts in ([r.prompt for r in rollouts], [r.tokens for r in rollouts])
        )
        prompts = len({r.question for r in rollouts})
        load = Load(prompts, len(rollouts), sampled, prompt, response)
        longest = max((len(r.tokens) for r in rollouts), default=1)
        width = self.models[0].product_width(self.run.dtype)
        per_second = self.devices * peak(self.device, width)
        found = phases(self.run, self.method, self.models, load, longest, n, self.device, USUAL)
        work = {phase.name: phase.operations for phase in found}
        shares = {
            f"mfu/{name}": work[name] / (seconds[name] * per_second)
            for name in work
            if seconds.get(name)
        }
        return shares | {
            "mfu/step": sum(work.values()) / (max(sum(seconds.values()), 1e-9) * per_second)
        }


def use_of(run: Run) -> Use | None:
    """For a run whose models are given by name, on a device whose peak is known."""
    device = find_device(setting=run.device)
    run = on_device(run, device.gpu)
    run = with_models(run, run.method_spec.load())
    method = as_run(run.method_spec.load(), run)
    if not device.tflops:
        return None
    once = replace(run, gradient_checkpointing=False)
    devices = processes() if device.gpu else 1  # processes share a CPU
    return Use(once, method, models_of(run, method), device, devices)
