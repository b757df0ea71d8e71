"""Who is on which device: the ways to lay a run out over several, what each takes, and which one
is the fastest that fits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from opdkit.base.config import plain
from opdkit.base.errors import UserError
from opdkit.methods.method import Method
from opdkit.models.held import HERE, Held
from opdkit.rewards import Reward
from opdkit.run.plan.changes import Change, others
from opdkit.run.plan.commands import commands
from opdkit.run.plan.devices import GIB
from opdkit.run.plan.estimate import RunPlan, check_response, checked, seconds_text, sized
from opdkit.run.plan.machines import Machines, find_machines
from opdkit.run.plan.memory import USABLE
from opdkit.run.plan.servers import Servers, pushing, samplers, smallest, teachers
from opdkit.run.plan.work import USUAL, Rates
from opdkit.run.refuse import refuse
from opdkit.run.settings import Run

SERVER = "http://HOST:8000"
MANY = 64  # splits that are all tried
ENGINE_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # gpu_memory_utilization, tried


@dataclass(frozen=True)
class Layout:
    """One way: what trains, and what samples and scores beside it."""

    plan: RunPlan  # of the processes that train
    ahead: int = 0  # steps by which the samplers run ahead of the trainer
    sampling: Servers | None = None  # None: the processes that train sample in turn
    teaching: Servers | None = None  # None: they score with a teacher of their own
    taught: Held | None = None  # the teacher that servers have

    @property
    def trainers(self) -> int:
        return self.plan.machines.size

    @property
    def name(self) -> str:
        if not self.plan.step.sampled:
            return f"{self.trainers} train"
        if self.sampling is None:
            engine = self.plan.run.sampler_settings.kind
            return f"{self.trainers} train and sample in turn, {engine}"
        count = self.sampling.count * self.sampling.devices
        words = [f"{self.trainers} train", f"{count} sample"]
        words += [f"{self.teaching.count} teach"] if self.teaching else []
        return ", ".join(words) + (f", {self.ahead} ahead" if self.ahead else "")

    @property
    def bytes(self) -> dict[str, int]:
        """Of one device of each part, at most."""
        beside = {"sample": self.sampling, "teach": self.teaching}
        peak = {"train": self.plan.memory.peak[0]}
        return peak | {part: one.bytes for part, one in beside.items() if one is not None}

    @property
    def fits(self) -> bool:
        return self.plan.memory.fits and all(
            one.fits for one in (self.sampling, self.teaching) if one is not None
        )

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of a step, by part: the samplers' own and what takes weights to them, then the trainers';
        those of a teacher elsewhere are in `score`.
        """
        found = {phase.name: phase.seconds for phase in self.plan.phases}
        if self.sampling is not None:
            student = self.plan.models[0]
            found["push"] = pushing(self.plan.run, student, found.get("sample", 0.0))
            found["sample"] = self.sampling.seconds
        if self.teaching is not None:
            found["score"] += self.teaching.seconds
        order = ("push", "sample", "score", "learn")
        return {name: found[name] for name in order if name in found}

    @property
    def step(self) -> float:
        """Seconds of a step: of the slower part where samplers run ahead, else of all in turn."""
        away = sum(self.seconds.get(name, 0.0) for name in ("push", "sample"))
        here = sum(self.seconds.get(name, 0.0) for name in ("score", "learn"))
        return max(away, here) if self.ahead else away + here

    @property
    def rate(self) -> float:
        """Tokens that are learnt from, per second."""
        return self.plan.load.responses / self.step

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON; a time that is not known is None."""
        known = math.isfinite(self.step)
        return {
            "name": self.name,
            "trainers": self.trainers,
            "samplers": self.sampling.count if self.sampling else 0,
            "devices_of_a_sampler": self.sampling.devices if self.sampling else 0,
            "teachers": self.teaching.count if self.teaching else 0,
            "ahead": self.ahead,
            "sampler": plain(self.plan.run)["sampler"],
            "bytes": self.bytes,
            "seconds": self.seconds if known else None,
            "step": self.step if known else None,
            "tokens_per_second": self.rate if known else None,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Layouts:
    """All ways to lay a run out over devices."""

    run: Run  # as it is given, with what goes by the device
    method: Method
    reward: Reward | None
    machines: Machines
    rates: Rates = USUAL
    response: float | None = None
    notes: tuple[str, ...] = ()
    file: str = "RUN.yaml"  # what names the run in commands

    def planned(self, run: Run, machines: Machines) -> RunPlan:
        """The part that trains."""
        run = sized(run, self.method, machines.device, machines.size)
        return RunPlan(
            run, self.method, machines.device, self.rates, self.response, self.notes, machines
        )

    @cached_property
    def as_given(self) -> RunPlan:
        """One process on each device, with the run's own sampler."""
        return self.planned(self.run, self.machines)

    @cached_property
    def every(self) -> list[Layout]:
        return [*self._in_turn(), *self._split()]

    @cached_property
    def shown(self) -> list[Layout]:
        """The best of each kind, those with the fewest parts first."""
        kinds: dict[tuple[bool, bool, int, str], Layout] = {}
        for one in self.every:
            sampler = one.plan.run.sampler_settings.kind
            kind = (one.teaching is not None, one.sampling is not None, one.ahead, sampler)
            if kind not in kinds or _worth(one) < _worth(kinds[kind]):
                kinds[kind] = one
        return [kinds[kind] for kind in sorted(kinds)]

    @cached_property
    def recommended(self) -> Layout | None:
        """The fastest that fits; of those that are as fast by the numbers shown, the one with the
        fewest parts.
        """
        fitting = [one for one in self.shown if one.fits]
        if not fitting:
            return None
        fastest = min(one.step for one in fitting)
        return next(o for o in fitting if seconds_text(o.step) == seconds_text(fastest))

    @cached_property
    def samplers(self) -> dict[str, Run]:
        """The run with each kind of sampler, as it says it where it names this kind itself."""
        usual = self.run.sampler_settings
        own: dict[str, Any] = {
            "hf": "hf",
            "vllm": {"kind": "vllm", "enable_sleep_mode": True},
            # adapters alone are sent where there are any
            "server": {"kind": "server", "urls": [SERVER], "enable_lora": bool(self.run.lora)},
        }
        if usual.kind in own:
            own[usual.kind] = {**plain(usual), "kind": usual.kind}
        return {kind: replace(self.run, sampler=sampler) for kind, sampler in own.items()}

    @cached_property
    def refused(self) -> dict[str, str]:
        """The settings that the run's method or its models do not go with, and why."""
        tried = {f"sampler={kind}": run for kind, run in self.samplers.items()}
        tried["ahead=1"] = replace(self.samplers["server"], ahead=1)
        found = {setting: self._refusal(run) for setting, run in tried.items()}
        return {setting: why for setting, why in found.items() if why}

    def _refusal(self, run: Run) -> str:
        if run.lora is not None and run.lora.quantize and not run.sampler_settings.on_student:
            return "another engine cannot take over weights in so few bits"
        try:
            with redirect_stderr(io.StringIO()):
                refuse(run, self.method, self.reward)
        except UserError as error:
            return str(error)
        return ""

    @property
    def _beside(self) -> bool:
        """Whether there can be engines beside the processes that train."""
        return self.machines.device.gpu and self.as_given.step.sampled > 0

    def _in_turn(self) -> Iterator[Layout]:
        """Every device trains and samples."""
        if "sampler=hf" not in self.refused:
            yield Layout(self.planned(self.samplers["hf"], self.machines))
        if self._beside and "sampler=vllm" not in self.refused:
            engine = self.samplers["vllm"]
            free = engine.sampler_settings.kind != self.run.sampler_settings.kind
            yield Layout(self._with_room(engine, free))

    def _with_room(self, run: Run, free: bool) -> RunPlan:
        """With as large a share of the device for the engine as fits, where that is `free`."""
        shares: tuple[Mapping[str, Any], ...] = ({},)
        if free:
            shares = tuple({"gpu_memory_utilization": share} for share in ENGINE_SHARES)
        said = plain(run.sampler_settings) | {"kind": "vllm"} if shares[0] else run.sampler
        for share in shares:
            sampler = {**said, **share} if isinstance(said, dict) else said
            made = self.planned(replace(run, sampler=sampler), self.machines)
            if made.memory.fits:
                break
        return made

    def _split(self) -> Iterator[Layout]:
        """Some train, vLLM servers on others sample, and servers on others teach."""
        if not self._beside or "sampler=server" in self.refused:
            return
        first, server = self.as_given, self.samplers["server"]
        engine = smallest(self.run, first.models[0], first.step, self.machines)
        if engine is None:
            return
        taught = self._taught(server)
        for trainers in _parts(self.machines):
            rest = self.machines.size - trainers.size
            plans = {0: self.planned(server, trainers)}
            if taught is not None:
                for count in _doubled(rest - engine):
                    plans.setdefault(1, self.planned(taught, trainers))
                    yield from self._with_servers(plans[1], rest - count, engine, count)
            yield from self._with_servers(plans[0], rest, engine, 0)

    def _taught(self, run: Run) -> Run | None:
        """The run with its teacher on a server, where it has one that can be."""
        if not run.teachers.opens_local_model or run.teachers.routes:
            return None
        evaluate = None if run.evaluate is None else replace(run.evaluate, teacher=False)
        other = replace(run, teacher=SERVER, evaluate=evaluate)
        return None if self._refusal(other) else other

    def _with_servers(
        self, plan: RunPlan, devices: int, engine: int, taught: int
    ) -> Iterator[Layout]:
        """Samplers on so many devices, at each of their sizes, and one step ahead or not."""
        if devices < engine:
            return
        student, load, device = plan.models[0], plan.load, plan.device
        teaching = held = None
        if taught:
            held = next(h for h in self.as_given.models if h.kind == "teacher" and h.where == HERE)
            teaching = teachers(self.run, self.method, held, load, device, self.rates, taught)
        count = min(devices // engine, plan.step.prompts)  # one without a prompt would be idle
        sampling = samplers(plan.run, student, plan.step, load, device, self.rates, count, engine)
        for ahead in (0,) if "ahead=1" in self.refused else (0, max(1, self.run.ahead)):
            yield Layout(plan, ahead, sampling, teaching, held)

    @cached_property
    def changes(self) -> list[Change]:
        """What would make one fit, where none does: other settings, each alone, or more devices."""
        if self.recommended is not None:
            return []
        usual = self.as_given
        found = [
            replace(self, run=run).change(setting)
            for setting, run in others(self.run, self.method, usual.step)
        ]
        grown = _more(self.machines)
        more = next((x for x in grown if replace(self, machines=x).recommended), None)
        if more is not None:
            found.append(replace(self, machines=more).change(f"--device {more.words.lower()}"))
        return sorted((c for c in found if c.fits), key=lambda change: change.peak)

    def change(self, setting: str) -> Change:
        """What one device takes in the smallest layout; `setting` made it so."""
        sizes = [(not one.fits, max(one.bytes.values())) for one in self.shown]
        misses, size = min(sizes, default=(True, 0))
        return Change(setting, size, not misses)

    # -------------------------------------------------------------------------------------- as text

    def table(self) -> str:
        """The best of each kind, as Markdown: GiB of one device of each part, seconds of a step."""
        names = ("layout", "train", "sample", "teach", "step", "of which", "tokens/s", "fits")
        rows: list[tuple[str, ...]] = [names]
        for one in self.shown:
            sizes = [f"{one.bytes[p] / GIB:.1f}" if p in one.bytes else "" for p in PARTS]
            spent = ", ".join(f"{n} {seconds_text(s)}" for n, s in one.seconds.items())
            rate = f"{one.rate:,.0f}" if math.isfinite(one.step) else "unknown"
            verdict = "yes" if one.fits else "no"
            verdict += ", recommended" if one is self.recommended else ""
            rows.append((one.name, *sizes, seconds_text(one.step), spent, rate, verdict))
        return markdown_table(rows)

    def __str__(self) -> str:
        lines = [
            str(self.as_given),
            "",
            f"layouts on {self.machines.words}: GiB of one device of each part, of {USABLE:.0%} of "
            f"{self.machines.device.memory / GIB:.1f}; seconds of a step",
            self.table(),
        ]
        if self._beside:
            lines += [f"none with {setting}: {why}" for setting, why in self.refused.items()]
        return "\n".join([*lines, "", *self._advice()])

    def _advice(self) -> list[str]:
        best = self.recommended
        if best is None:
            alone = [f"  {c.peak / GIB:9.2f} GiB  {c.setting}, fits" for c in self.changes]
            told = ["one change alone would make one fit", *alone]
            return ["no layout fits", *(told if alone else ["nor does one with a change alone"])]
        lines = [f"recommended: {best.name}: {self._reason(best)}"]
        return lines + [f"  {line}" for line in commands(best, self.machines, self.file)]

    def _reason(self, best: Layout) -> str:
        """Why it is the one, in a sentence."""
        fitting = [one for one in self.shown if one.fits and one is not best]
        if math.isinf(best.step):
            return "it fits, and has the fewest parts; how fast the device is nobody has said"
        words = f"{seconds_text(best.step)} a step"
        if not fitting:
            words += ", the only one that fits"
        else:
            next_ = min(fitting, key=lambda one: one.step)
            words += f", the fastest that fits: {next_.name} takes {next_.step / best.step:.2f} "
            words += "times as long"
        if best.ahead:
            steps = "one step" if best.ahead == 1 else f"{best.ahead} steps"
            words += f"; rollouts are written by the weights of {steps} earlier"
        return words

    def to_dict(self) -> dict[str, Any]:
        """The plan of the run as it is given, on each device, and every layout."""
        best = self.recommended
        return self.as_given.to_dict() | {
            "machines": asdict(self.machines),
            "exchanges": [asdict(one) for one in self.as_given.exchanges],
            "layouts": [one.to_dict() for one in self.every],
            "refused": self.refused,
            "recommended": None
            if best is None
            else best.to_dict() | {"commands": commands(best, self.machines, self.file)},
            "changes": [asdict(change) for change in self.changes],
        }


PARTS = ("train", "sample", "teach")


def plan_on(
    run: Run,
    machines: Machines,
    *,
    rates: Rates = USUAL,
    response: float | None = None,
    file: str = "RUN.yaml",
) -> Layouts:
    """Every layout of a run over these devices; what the run would refuse is refused.

    response: as `plan`. file: what names the run in commands, with its settings.
    """
    check_response(response)
    run, method, reward, notes = checked(run, machines.device)
    refuse(run, method, reward)
    if run.cluster is not None:  # a layout is what one would place
        notes = (*notes, f"cluster={run.cluster} is not planned as it is, but what it might place")
        run, file = replace(run, cluster=None), f"{file} cluster=null"
    return Layouts(run, method, reward, machines, rates, response, notes, file)


def table(run: Run, device: str | Machines) -> str:
    """The layouts of a run over devices (`8xh100`), as a table in Markdown."""
    machines = device if isinstance(device, Machines) else find_machines(device)
    return plan_on(run, machines).table()


def _worth(one: Layout) -> tuple[bool, float, float]:
    """The less the better: what fits, then what is faster, then what takes less."""
    return not one.fits, one.step if one.fits else 0.0, max(one.bytes.values())


def _parts(machines: Machines) -> Iterator[Machines]:
    """The first of the devices, leaving some: any number of one machine, else whole machines; of
    very many 1, 2, 4 ...
    """
    most, unit = machines.each, 1
    if machines.nodes > 1:
        most, unit = machines.nodes, machines.each
    counts = range(1, most) if most <= MANY else _doubled(most - 1)
    yield from (machines.first(unit * count) for count in counts)


def _more(machines: Machines) -> Iterator[Machines]:
    """Twice as many, and twice that: up to 8 in a machine, then up to 16 machines."""
    while machines.each < 8 or machines.nodes < 16:
        each = min(2 * machines.each, 8)
        grown = replace(machines, each=each) if machines.each < 8 else machines
        machines = grown if grown != machines else replace(machines, nodes=2 * machines.nodes)
        yield machines


def _doubled(most: int) -> Iterator[int]:
    """1, 2, 4 ... up to `most`."""
    count = 1
    while count <= most:
        yield count
        count *= 2


def markdown_table(rows: list[tuple[str, ...]]) -> str:
    """Rows under a first one with their names, columns of one width."""
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(text.ljust(n) for text, n in zip(row, wide)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (n + 2) for n in wide) + "|", *lines[1:]])
