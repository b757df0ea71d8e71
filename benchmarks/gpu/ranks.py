"""Several processes, one per GPU (or on the CPU, by gloo): what they find is what one finds, and a
run that loses one of them goes on.

    torchrun --standalone --nproc-per-node N benchmarks/gpu/ranks.py CASES OUT

does runs one after the other: CASES is JSON, {name: settings}; the first process writes what each
came to into OUT.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import ROOT
from runs import quiet, run_of, same, weights_of
from setting import Check, Figures, Setting, Skip, must

from opdkit.base.config import to_yaml
from opdkit.base.files import read_lines
from opdkit.objective.parts import whole
from opdkit.run.build import prepare
from opdkit.run.launch import execute
from opdkit.run.settings import make_run
from opdkit.train.loop import train
from opdkit.train.mesh import ALONE, Mesh, joined

MOST = 1e-9  # in float64, in which the sums are taken in other orders
MINUTES = 4  # a run that hangs is ended

Found = dict[str, Any]


# ------------------------------------------------------------------------- in each of the processes


def found(values: Mapping[str, Any], mesh: Mesh) -> Found:
    """What a run comes to: its metrics and its weights, whole."""
    run = make_run(dict(values))
    job, state = prepare(run, mesh=mesh)
    with job.recorder.trackers:
        train(job, state)
    named = job.student.model.named_parameters()
    weights = {n: whole(p.detach()).cpu() for n, p in named if p.requires_grad}
    lines = read_lines(run.folder / "metrics.jsonl") if mesh.rank == 0 else []
    return {"metrics": lines, "weights": weights}


def main(cases: Path, out: Path) -> None:
    every: dict[str, Found] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with joined(device) as mesh:
        for name, values in json.loads(cases.read_text()).items():
            every[name] = found(values, mesh)
    if mesh.rank == 0:
        torch.save(every, out)


# ------------------------------------------------------------------------------------------ outside


def exact(setting: Setting, name: str, **settings: Any) -> dict[str, Any]:
    """A run in float64 on tiny models, whose numbers are those of one process whatever is split."""
    return run_of(
        setting,
        name,
        student=setting.model(f"tiny-{settings.pop('student', 'student')}"),
        teacher=setting.model("tiny-teacher"),
        data=setting.rows("few", 6, 320),
        dtype="float64",
        prompts_per_step=3,
        sampling={"num_generations": 2, "max_completion_length": 6},
        optim={"learning_rate": 1e-3},
        **settings,
    )


CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora": {"r": 4, "alpha": 8}},
    "top k": {"method": "topk_opd"},
    "credits": {"method": "iw_opd"},
    "teachers whole": {"shard_teachers": False},
    "head apart": {"student": "untied"},
    "experts": {"student": "experts"},
    "ahead": {"ahead": 1, "steps": 3},
}


def _processes(setting: Setting) -> list[int]:
    if not setting.gpu:
        return [2]
    if setting.gpus < 2:
        raise Skip(f"needs 2 GPUs, here is {setting.gpus}")
    return sorted({2, setting.gpus})


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command, ended in the end with all that it started."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # which it hands on
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
            process.kill()


def _run(command: list[str]) -> tuple[int, str]:
    """The status of a command, and what it complained of."""
    with _started(command) as process:
        try:
            _, said = process.communicate(timeout=60 * MINUTES)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{' '.join(command[-6:])} hung for {MINUTES} minutes") from None
    return process.returncode, said


def on(count: int, cases: Mapping[str, Mapping[str, Any]], setting: Setting) -> dict[str, Found]:
    """What these runs come to in so many processes."""
    here = setting.folder / f"on{count}"
    here.mkdir(exist_ok=True)
    mine = {n: {**v, "output": str(here / f"run{i}")} for i, (n, v) in enumerate(cases.items())}
    (here / "cases.json").write_text(json.dumps(mine))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    files = [str(here / "cases.json"), str(here / "found.pt")]
    status, said = _run([sys.executable, *launch, __file__, *files])
    must(status == 0, f"{count} processes failed:\n{said[-1500:]}")
    return torch.load(here / "found.pt", weights_only=False)


def equality(setting: Setting) -> Figures:
    """Metrics and weights of every case, one process against several."""
    counts = _processes(setting)
    cases = {name: exact(setting, f"one-{name}", **more) for name, more in CASES.items()}
    with quiet():
        alone = {name: found(values, ALONE) for name, values in cases.items()}
    figures: Figures = {}
    for count in counts:
        several = on(count, cases, setting)
        for name in cases:
            a, b = alone[name], several[name]
            far = max(float((x - b["weights"][n]).abs().max()) for n, x in a["weights"].items())
            figures[f"{name}, {count}"] = max(far, same(a["metrics"], b["metrics"]))
    far = {name: value for name, value in figures.items() if not value <= MOST}
    must(not far, f"not what one process finds, by {far}")
    return figures


def speed(setting: Setting) -> Figures:
    """Response tokens per second of one process and of several, in the device's own type."""
    counts, steps = _processes(setting), 3
    each = {"num_generations": 1, "max_completion_length": 4 if setting.small else 256}
    per = 2 if setting.small else 32  # prompts per process
    figures: Figures = {}
    for count in sorted({1, *counts}):
        values = run_of(setting, "speed", steps=steps, prompts_per_step=per * count, sampling=each)
        lines = on(count, {"speed": values}, setting)["speed"]["metrics"]
        figures[f"tokens/s on {count}"] = lines[-1]["tokens_per_second/step"]
        figures[f"peak GiB on {count}"] = lines[-1]["memory/peak_gib"]
    must(all(math.isfinite(value) for value in figures.values()), f"{figures}")
    return figures


# ------------------------------------------------------------------------- killed, and gone on with


def _train(values: Mapping[str, Any], count: int, *more: str) -> list[str]:
    path = Path(values["output"]).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(make_run(dict(values))))
    return [sys.executable, "-m", "opdkit", "train", str(path), "--nproc", str(count), *more]


def _killed(values: Mapping[str, Any], count: int) -> float:
    """A run of which one process is killed once it has saved; seconds until the others ended."""
    folder = Path(values["output"])
    with _started(_train(values, count, "--overwrite")) as run:
        end = time.monotonic() + 60 * MINUTES
        while run.poll() is None and not (folder / "checkpoint-2").exists():
            must(time.monotonic() < end, "no checkpoint was written")
            time.sleep(0.02)
        must(run.poll() is None, "the run ended before it could be killed")
        os.kill(_child(run.pid, count - 1), signal.SIGKILL)
        start = time.monotonic()
        _, said = run.communicate(timeout=60)
        must(run.returncode != 0, "a run that lost a process ended well")
        must("was ended by SIGKILL" in said, f"it does not say what happened: {said[-300:]}")
        return time.monotonic() - start


def _child(parent: int, rank: int) -> int:
    """The process that was told this rank."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                told = (entry / "environ").read_bytes().split(b"\0")
                if int(stat[1]) == parent and f"RANK={rank}".encode() in told:
                    return int(entry.name)
    raise RuntimeError(f"process {rank} of the run is not there")


def resume(setting: Setting) -> Figures:
    """One process is killed: the others end soon, and the run goes on to the weights of one that
    was never interrupted, on as many processes and on one.
    """
    if not Path("/proc/self/stat").exists():
        raise Skip("finds processes in /proc, which this system has not")
    count = max(_processes(setting))
    saved = {"checkpoint": {"every": 1, "keep": 9}, "steps": 40}
    cut = exact(setting, "killed", **saved)
    seconds = _killed(cut, count)
    must(seconds < 10, f"the others ended only {seconds:.0f} s after")
    alone = exact(setting, "alone", **saved)
    shutil.rmtree(alone["output"], ignore_errors=True)
    shutil.copytree(cut["output"], alone["output"])
    at = max(int(f.name.split("-")[1]) for f in Path(cut["output"]).glob("checkpoint-*"))
    steps = at + 2
    left = {}
    for name, processes, more in (
        ("whole", count, ["--overwrite"]),
        ("killed", count, ["--resume"]),
    ):
        values = exact(setting, name, **{**saved, "steps": steps})
        status, said = _run(_train(values, processes, *more))
        must(status == 0, f"{name}: {said[-600:]}")
        left[name] = weights_of(values["output"])
    with quiet():
        execute(make_run({**alone, "steps": steps}), resume=True)
    left["alone"] = weights_of(alone["output"])
    figures: Figures = {"seconds until the others ended": seconds, "step of the kill": at}
    for name, what in (("killed", f"gone on with on {count}"), ("alone", "gone on with on 1")):
        far = max(float((x - left[name][n]).abs().max()) for n, x in left["whole"].items())
        must(far <= MOST, f"the weights of the run {what} are {far:g} off")
        figures[f"weights apart, {what}"] = far
    return figures


CHECKS = (
    Check("processes", "one against several, FSDP2: metrics and weights", 150, equality),
    Check("resume", "one process killed, the run goes on", 150, resume),
    Check("speed of processes", "tokens/s of one and of several", 150, speed),
)

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
