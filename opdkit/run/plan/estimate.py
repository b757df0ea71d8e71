"""The plan of a run: everything that is reckoned, as one value that prints as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from opdkit.base.config import plain
from opdkit.base.errors import UserError
from opdkit.base.launched import processes
from opdkit.base.progress import duration
from opdkit.curricula import Plain
from opdkit.methods.explain import passes
from opdkit.methods.method import Method
from opdkit.models.held import ELSEWHERE, Held
from opdkit.rewards import Reward, load_reward
from opdkit.run.plan.changes import Change, changes
from opdkit.run.plan.devices import GIB, Device, find_device
from opdkit.run.plan.machines import Machines
from opdkit.run.plan.memory import PHASES, USABLE, Memory, Step, memory_of, part_of, step_of
from opdkit.run.plan.models import models_of
from opdkit.run.plan.ranks import Exchange, exchanged, exchanges
from opdkit.run.plan.work import USUAL, Load, Phase, Rates, load_of, phases, sampling
from opdkit.run.prompts import as_run
from opdkit.run.refuse import refuse
from opdkit.run.resolve import on_device, with_models
from opdkit.run.settings import Run

WIDE = 58  # of the names in the table of memory
INSTALLED = ("math", "reasoning_gym", "code")  # rewards that need packages, or a sandbox


MICRO = (16384, 8192, 4096, 2048)  # tokens of a forward pass that are tried, largest first


def plan(
    run: Run, device: Device, *, rates: Rates = USUAL, response: float | None = None
) -> RunPlan:
    """What the run will do and take on a device; on several: `layouts.plan_on`.

    `response`: mean length of responses, in tokens; None: a share of the longest.
    """
    check_response(response)
    run, method, reward, notes = checked(run, device)
    refuse(run, method, reward)
    return RunPlan(sized(run, method, device), method, device, rates, response, notes)


def check_response(response: float | None) -> None:
    """Refuses a mean length of responses that cannot be."""
    if response is not None and response <= 0:
        raise UserError(
            f"a mean response of {response:g} tokens cannot be: give a positive number, or none "
            "for half of the limit"
        )


def checked(run: Run, device: Device) -> tuple[Run, Method, Reward | None, tuple[str, ...]]:
    """The run with what goes by the device, its method and its reward, and what there is to say."""
    run = on_device(run, device.gpu)
    run = with_models(run, run.method_spec.load())
    method = as_run(run.method_spec.load(), run)
    reward, notes = _reward(run)
    return run, method, reward, notes


def sized(run: Run, method: Method, device: Device, ranks: int = 1) -> Run:
    """With the largest forward passes that a GPU has room for, where the run leaves them open."""
    if run.micro_batch_tokens is not None or not device.gpu:
        return run
    models = models_of(run, method)
    for tokens in MICRO:
        tried = replace(run, micro_batch_tokens=tokens)
        step = step_of(tried, method.curriculum, device)
        if memory_of(tried, method, models, step, device, ranks).fits:
            return tried
    return run


def fitting(run: Run) -> int | None:
    """`micro_batch_tokens` of a run on the GPU that is here; None on a CPU, and where it cannot be
    reckoned: an estimate ends no run.
    """
    try:
        device = find_device(setting=run.device)
        method = as_run(run.method_spec.load(), run)
        return sized(run, method, device, processes()).micro_batch_tokens
    except Exception:
        return run.micro_batch_tokens


def _reward(run: Run) -> tuple[Reward | None, tuple[str, ...]]:
    """The reward.

    One that needs what is not installed here gets a note: the run may be meant for another machine.
    """
    try:
        return load_reward(run.reward, run.reward_weights), ()
    except UserError as error:
        named = run.reward.values() if isinstance(run.reward, dict) else [run.reward]
        if not set(named) & set(INSTALLED):
            raise
        return lambda rollout: 0.0, (f"the reward cannot be used on this machine: {error}",)


@dataclass(frozen=True)
class RunPlan:
    """Memory is of the longest prompts and responses allowed, time of the mean ones."""

    run: Run
    method: Method
    device: Device
    rates: Rates
    response: float | None = None
    notes: tuple[str, ...] = ()
    shared_by: Machines | None = None  # several processes, one a device; None: one process

    @cached_property
    def machines(self) -> Machines:
        return self.shared_by or Machines(self.device)

    @cached_property
    def models(self) -> list[Held]:
        return models_of(self.run, self.method)

    @cached_property
    def step(self) -> Step:
        return step_of(self.run, self.method.curriculum, self.device)

    @cached_property
    def memory(self) -> Memory:
        return self._memory(self.run)

    def _memory(self, run: Run) -> Memory:
        step = step_of(run, self.method.curriculum, self.device)
        models, ranks = models_of(run, self.method), self.machines.size
        return memory_of(run, self.method, models, step, self.device, ranks)

    @cached_property
    def changes(self) -> list[Change]:
        """What would make it fit; nothing where it does."""
        return [] if self.memory.fits else changes(self.run, self.method, self.step, self._memory)

    @cached_property
    def load(self) -> Load:
        return load_of(self.step, self.rates, self.response)

    @cached_property
    def mine(self) -> Load:
        """One process's part of it."""
        return load_of(part_of(self.step, self.machines.size), self.rates, self.response)

    @cached_property
    def exchanges(self) -> list[Exchange]:
        """What processes tell each other; nothing where there is one."""
        if self.machines.size == 1:
            return []
        mine = part_of(self.step, self.machines.size)
        return exchanges(
            self.run, self.method, self.models, self.step, mine, self.mine, self.machines
        )

    @cached_property
    def phases(self) -> list[Phase]:
        found = phases(
            self.run,
            self.method,
            self.models,
            self.mine,
            self.step.response,
            self.memory.rows,
            self.device,
            self.rates,
            self.machines.size,
        )
        return [exchanged(phase, self.exchanges) for phase in found]

    @property
    def step_seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @cached_property
    def evaluations(self) -> tuple[int, float]:
        """How often the student is evaluated, and the seconds of one; unknown (NaN) where the
        number of problems is.
        """
        settings, run = self.run.evaluate, self.run
        if settings is None:
            return 0, 0.0
        count = 2 + ((run.steps - 1) // settings.every if settings.every else 0)
        problems = settings.prompts.limit
        if problems is None:
            return count, math.nan
        drawn = replace(settings.sampling or run.sampling, num_generations=settings.num_generations)
        asked = replace(
            run, data=settings.prompts, prompts_per_step=problems, sampling=drawn, sampler="hf"
        )
        alone = replace(self, run=asked, method=replace(self.method, curriculum=Plain()))
        step, rows = alone.step, alone.memory.rows
        return count, sampling(
            asked, self.models[0], alone.mine, step.response, rows, self.device, self.rates
        ).seconds

    @property
    def seconds(self) -> float:
        """Of the run; evaluations of which the number of problems is not known are left out."""
        count, each = self.evaluations
        return self.run.steps * self.step_seconds + (0 if math.isnan(each) else count * each)

    # -------------------------------------------------------------------------------------- as text

    def __str__(self) -> str:
        notes = ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join(
            [*self._what(), "", *self._memory_table(), "", *self._time_table(), *notes]
        )

    def _what(self) -> list[str]:
        lines = [
            self.run.yaml().rstrip(),
            "",
            f"objective: {self.method}",
            f"reads: {self.method.needs}",
        ]
        lines += [
            "forward passes of a step, besides sampling",
            *(f"  {i}. {x}" for i, x in enumerate(passes(self.method), 1)),
        ]
        before = self.method.curriculum.before
        lines += [f"before the first step the student writes {before}"] if before else []
        lines += ["", "models"]
        for held in self.models:
            words = [f"{held.role:<12} {held.name}"]
            if held.shape is not None:
                words.append(
                    f"{held.shape.parameters / 1e6:,.1f}M parameters, {held.numbers}, shape from "
                    f"{held.shape.origin}"
                )
            words.append(held.where if held.own else f"{held.where}, weights as above")
            lines.append("  " + "  ".join(words))
        return lines

    @property
    def _where(self) -> str:
        many = self.machines.size > 1
        return f"each of {self.machines.words}" if many else self.device.name

    def _memory_table(self) -> list[str]:
        memory, step = self.memory, self.step
        peak, phase = memory.peak
        name, unit = ("GiB", GIB) if peak >= GIB else ("MiB", 2**20)
        lines = [
            f"memory of {self._where} in {name}, with {step.rollouts} rollouts of at most "
            f"{step.prompt} + {step.response} tokens",
            f"  {'':<{WIDE}}" + "".join(f"{p:>9}" for p in PHASES),
        ]
        for part in memory.parts:
            cells = "".join(
                f"{part.bytes[p] / unit:9.2f}" if p in part.bytes else f"{'':9}" for p in PHASES
            )
            lines.append(f"  {part.name:<{WIDE}}{cells}".rstrip())
        lines.append(
            f"  {'total':<{WIDE}}" + "".join(f"{memory.total(p) / unit:9.2f}" for p in PHASES)
        )
        verdict = "fits" if memory.fits else "does not fit"
        lines.append(
            f"memory: about {peak / unit:.2f} {name} in {phase}, of {USABLE:.0%} of "
            f"{memory.device.memory / GIB:.1f} GiB: {verdict}"
        )
        if self.changes:
            lines.append("  one setting alone would make it")
            lines += [
                f"  {c.peak / unit:9.2f} {name}  {c.setting}{', fits' if c.fits else ''}"
                for c in self.changes
            ]
        return lines

    def _time_table(self) -> list[str]:
        load, rates = self.load, self.rates
        lines = [
            f"time of a step on {self.machines.words}, with prompts of {load.prompt:.0f} and "
            f"responses of {load.response:.0f} tokens on average: {load.written:,.0f} tokens "
            "written"
        ]
        for phase in self.phases:
            lines.append(
                f"  {phase.name:<8}{seconds_text(phase.seconds):>10}  "
                f"{_operations(phase.operations):>12}  {phase.says}"
            )
        if any(held.where == ELSEWHERE for held in self.models):
            lines.append("  the teacher's own time, elsewhere, is not counted")
        count, each = self.evaluations
        lines.append(f"  {'step':<8}{seconds_text(self.step_seconds):>10}")
        if count:
            unknown = "not counted: evaluate.data.limit says of how many problems"
            known = unknown if math.isnan(each) else f"{seconds_text(each)} each"
            lines.append(f"  {count} evaluations of the student: {known}")
        lines.append(
            f"time: about {seconds_text(self.seconds)} for {self.run.steps} steps, rewards and "
            "checkpoints not counted"
        )
        if self.method.curriculum.before:
            lines.append("  what is written before the first step is not counted")
        if math.isinf(self.seconds):
            lines.append(
                "  the rates of this device are not known: give --device-tflops and "
                "--device-bandwidth"
            )
            return lines
        d = self.device
        lines.append(
            f"assumed: peaks of {d.tflops:,.4g} TFLOP/s bfloat16, {d.tflops32:,.4g} float32, "
            f"{d.bandwidth:.3g} TB/s; reached of these {rates.learn:.0%} in learn, "
            f"{rates.score:.0%} elsewhere, {rates.read:.0%} of the bandwidth; to start a layer's "
            f"kernels {rates.launch * 1e3:g} ms in transformers, {rates.graph * 1e3:g} ms in vLLM"
        )
        if self.machines.size > 1:
            lines.append(f"exchange: {self.machines.links}")
        return lines

    # -------------------------------------------------------------------------------------- as JSON

    def to_dict(self) -> dict[str, Any]:
        """The same numbers; bytes, seconds and operations. A time that is not known is None."""
        peak, phase = self.memory.peak
        count, each = self.evaluations
        return {
            "run": plain(self.run),
            "objective": str(self.method),
            "reads": sorted(str(self.method.needs).split(", ")),
            "passes": passes(self.method),
            "device": asdict(self.device),
            "models": [
                {
                    "role": held.role,
                    "name": held.name,
                    "where": held.where,
                    "dtype": held.dtype or None,
                    "parameters": None if held.shape is None else held.shape.parameters,
                    "shape_from": None if held.shape is None else held.shape.origin,
                }
                for held in self.models
            ],
            "step": asdict(self.step) | {"tokens_written": self.load.written},
            "memory": {
                "parts": [asdict(part) for part in self.memory.parts],
                "total": {name: self.memory.total(name) for name in PHASES},
                "peak": peak,
                "peak_phase": phase,
                "fits": self.memory.fits,
                "changes": [asdict(change) for change in self.changes],
            },
            "time": {
                "phases": [
                    {
                        "name": p.name,
                        "seconds": _known(p.seconds),
                        "operations": p.operations,
                        "says": p.says,
                    }
                    for p in self.phases
                ],
                "step": _known(self.step_seconds),
                "evaluations": count,
                "evaluation": _known(each),
                "run": _known(self.seconds),
                "assumed": asdict(self.rates),
            },
            "notes": list(self.notes),
        }


def _known(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def seconds_text(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _operations(number: float) -> str:
    power, name = next(
        ((p, n) for p, n in ((15, "P"), (12, "T")) if number >= 0.1 * 10**p), (9, "G")
    )
    return f"{number / 10**power:.3g} {name}FLOP"
