"""What would make a run that does not fit smaller: settings, each tried alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from opdkit.base.config import plain
from opdkit.base.errors import UserError
from opdkit.methods.method import Method
from opdkit.run.plan.memory import Memory, Step
from opdkit.run.settings import Run
from opdkit.teachers.kinds import teacher_of
from opdkit.train.settings import Lora

TOLD_BELOW = 0.99  # of the peak: what lowers it by less is not told


@dataclass(frozen=True)
class Change:
    """A setting, and the peak with it alone."""

    setting: str
    peak: int
    fits: bool


def changes(
    run: Run, method: Method, step: Step, memory_with: Callable[[Run], Memory]
) -> list[Change]:
    """Those that lower the peak, the best first."""
    before = memory_with(run).peak[0]
    tried = [(setting, memory_with(other)) for setting, other in others(run, method, step)]
    out = [
        Change(setting, memory.peak[0], memory.fits)
        for setting, memory in tried
        if memory.peak[0] < TOLD_BELOW * before
    ]
    return sorted(out, key=lambda change: change.peak)


def others(run: Run, method: Method, step: Step) -> Iterator[tuple[str, Run]]:
    """The run with one setting changed so that it may take less, and what that is called."""
    if run.lora is None:
        yield "lora.r=32", replace(run, lora=Lora())
    if run.lora is None or run.lora.quantize is None:
        yield "lora.quantize=4bit", replace(run, lora=replace(run.lora or Lora(), quantize="4bit"))
    if run.dtype == "float32":
        yield "dtype=bfloat16", replace(run, dtype="bfloat16")
    if not run.gradient_checkpointing:
        yield "gradient_checkpointing=true", replace(run, gradient_checkpointing=True)
    if step.micro > step.longest:
        yield f"micro_batch_tokens={step.longest}", replace(run, micro_batch_tokens=step.longest)
    if run.prompts_per_step > 1:
        half = run.prompts_per_step // 2
        yield f"prompts_per_step={half}", replace(run, prompts_per_step=half)
    for setting, sampler in run.sampler_settings.lighter():
        yield setting, replace(run, sampler=plain(sampler) | {"kind": sampler.kind})
    usual = run.teacher_dtype or run.dtype
    for setting, teacher in run.teachers.lighter(usual, bool(method.teacher_mix)):
        yield setting, replace(run, teacher=teacher.said())
    if run.teachers.opens_local_model and not run.teachers.routes:
        yield from _moved(run, method)


def _moved(run: Run, method: Method) -> Iterator[tuple[str, Run]]:
    """The teacher on another device, where the method reads what a server can say."""
    server = "http://HOST:8000"
    try:
        teacher_of(server).refuse(method.name, method.needs)
    except UserError:
        return
    evaluate = None if run.evaluate is None else replace(run.evaluate, teacher=False)
    yield f"teacher={server}, on its own device", replace(run, teacher=server, evaluate=evaluate)
