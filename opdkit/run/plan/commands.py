"""The command lines that start a layout."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from opdkit.base.config import plain
from opdkit.run.plan.machines import Machines
from opdkit.run.plan.servers import sent_alone
from opdkit.run.settings import Run
from opdkit.sampling.servers import ADAPTERS, COMMAND

if TYPE_CHECKING:
    from opdkit.run.plan.layouts import Layout

SAMPLES, TEACHES = 8000, 8100  # the first ports of servers


def commands(layout: Layout, machines: Machines, file: str) -> list[str]:
    """What to type, servers first, and on which machine where there are several."""
    settings = [f"ahead={layout.ahead}"] if layout.ahead else []
    if layout.sampling is None:
        sampler = [f"sampler={_sampler(layout)}"] if layout.plan.step.sampled else []
        return _train(layout, sampler, file)
    samples, sampler_urls = _samplers(layout, machines)
    teaches, teacher_urls = _teachers(layout, machines)
    if teacher_urls:
        settings.insert(0, f"teacher=server:{','.join(teacher_urls)}")
    settings.insert(0, f"sampler={_servers(layout, sampler_urls, machines)}")
    lines = [*samples, *teaches, *_train(layout, settings, file, machines)]
    if layout.sampling.devices == 1:
        counts = f"trainers: {layout.trainers}, samplers: {layout.sampling.count}"
        counts += f", teachers: {layout.teaching.count}" if layout.teaching else ""
        ahead = f" ahead={layout.ahead}" if layout.ahead else ""
        lines.append(
            f"or, on a Ray cluster: opdkit train {file} 'cluster={{kind: ray, {counts}}}' "
            f"sampler=vllm{ahead}"
        )
    return lines


def _sampler(layout: Layout) -> str:
    """The setting of one that samples in turn with the trainer, as a command line takes it."""
    said = layout.plan.run.sampler
    return said if isinstance(said, str) else _group(changed(layout))


def changed(layout: Layout) -> dict[str, Any]:
    """The sampler's settings that are not the usual ones of its kind."""
    settings: Any = layout.plan.run.sampler_settings
    usual = {f.name: f.default for f in fields(settings)}
    said = {k: v for k, v in plain(settings).items() if v != usual[k]}
    return {"kind": settings.kind, **said}


def _group(settings: Mapping[str, Any]) -> str:
    """As YAML in one line, without quotes where it needs none."""

    def word(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(word, value))}]"
        bare = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./:-]*", value)
        return str(value) if bare else json.dumps(value)

    return "{" + ", ".join(f"{name}: {word(value)}" for name, value in settings.items()) + "}"


def _train(layout: Layout, settings: list[str], file: str, of: Machines | None = None) -> list[str]:
    mine, said = layout.plan.machines, shlex.join(settings)
    if mine.nodes == 1:
        some = of is not None and mine.each < of.size
        numbers = ",".join(map(str, range(mine.each)))
        where = f"CUDA_VISIBLE_DEVICES={numbers} " if some and of.nodes == 1 else ""  # type: ignore[union-attr]
        host = "on HOST1: " if of is not None and of.nodes > 1 else ""
        return [f"{host}{where}opdkit train {file} --nproc {mine.each} {said}"]
    launch = (
        f"torchrun --nnodes {mine.nodes} --nproc-per-node {mine.each} --rdzv-backend c10d "
        f"--rdzv-endpoint HOST1:29500 -m opdkit train {file} {said}"
    )
    return [
        f"on each of HOST1 ... HOST{mine.nodes}: {launch}",
        f"or, under SLURM: opdkit slurm {file} --nodes {mine.nodes} --gpus {mine.each} {said}",
    ]


def _samplers(layout: Layout, machines: Machines) -> tuple[list[str], list[str]]:
    """A line for each machine, and the addresses of all."""
    servers = layout.sampling
    assert servers is not None
    made, lines, urls = servers.devices, [], []
    starts = [layout.trainers + made * i for i in range(servers.count)]
    several = f" --tensor-parallel-size {made}" if made > 1 else ""
    longest = layout.plan.step.longest + 1
    for node in sorted({start // machines.each for start in starts}):
        places = [s % machines.each for s in starts if s // machines.each == node]
        host = _host(node, machines)
        serve = _serve(layout.plan.run).replace("127.0.0.1", host)
        serve += f"{several} --max-model-len {longest}"
        devices = "$i" if made == 1 else f"$(seq -s, $i $((i + {made - 1})))"
        which = " ".join(map(str, places))
        lines.append(
            f"{_on(node, machines)}for i in {which}; do CUDA_VISIBLE_DEVICES={devices} {serve} "
            f"--port $(({SAMPLES} + i)) & done"
        )
        urls += [f"http://{host}:{SAMPLES + place}" for place in places]
    return lines, urls


def _serve(run: Run) -> str:
    """What starts a server of the student, or of its adapters on it."""
    rank = sent_alone(run)
    text = ADAPTERS.replace("RANK", str(rank)) if rank else COMMAND
    return text.replace("MODEL", run.student)


def _servers(layout: Layout, urls: list[str], machines: Machines) -> str:
    """The sampler's setting: a folder that all see has to be named where they are elsewhere."""
    said = changed(layout) | {"urls": urls}
    if machines.nodes > 1:
        said["shared_folder"] = said.get("shared_folder", "FOLDER")
    return f"server:{','.join(urls)}" if set(said) == {"kind", "urls"} else _group(said)


def _teachers(layout: Layout, machines: Machines) -> tuple[list[str], list[str]]:
    """A line for each server, and the addresses of all."""
    if layout.teaching is None or layout.taught is None:
        return [], []
    count, held = layout.teaching.count, layout.taught
    lines, urls = [], []
    for i in range(machines.size - count, machines.size):
        node, place = divmod(i, machines.each)
        host = _host(node, machines)
        remote = f" --host {host} --allow-remote" if machines.nodes > 1 else ""
        lines.append(
            f"{_on(node, machines)}CUDA_VISIBLE_DEVICES={place} opdkit serve-teacher {held.name} "
            f"--dtype {held.dtype} --port {TEACHES + place}{remote} &"
        )
        urls.append(f"http://{host}:{TEACHES + place}")
    return lines, urls


def _host(node: int, machines: Machines) -> str:
    return "127.0.0.1" if machines.nodes == 1 else f"HOST{node + 1}"


def _on(node: int, machines: Machines) -> str:
    return "" if machines.nodes == 1 else f"on HOST{node + 1}: "
