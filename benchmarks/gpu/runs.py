"""Whole runs in one process, as the command line makes them: speed, exact zeros, a lag, and
teachers that are away or in fewer bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from setting import Check, Figures, Setting, Skip, must

from opdkit.run.launch import execute
from opdkit.run.settings import make_run

Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl

TIMED = ("seconds/", "tokens_per_second/", "mfu/", "memory/")  # metrics that no two runs share


def run_of(setting: Setting, name: str, **settings: Any) -> dict[str, Any]:
    """The settings of a short run in the folder of that name."""
    small = setting.small
    values: dict[str, Any] = {
        "student": setting.model("student"),
        "teacher": setting.model("teacher"),
        "data": setting.rows("prompts", 8 if small else 64, setting.vocabulary),
        "method": {"name": "opd", "support": "full"},
        "output": str(setting.folder / "runs" / name),
        "dtype": setting.dtype,
        "device": setting.device,
        "steps": 2,
        "prompts_per_step": 4 if small else 16,
        "keep_samples": 0,
        "sampling": {"num_generations": 1, "max_completion_length": 6 if small else 128},
        "optim": {"learning_rate": 1e-4},
        "seed": setting.seed,
    }
    return values | settings


def done(values: Mapping[str, Any]) -> list[Any]:
    """The metrics of a run, a line per step."""
    shutil.rmtree(values["output"], ignore_errors=True)
    with quiet():
        return execute(make_run(dict(values))).metrics


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that is said within is shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def same(a: Lines, b: Lines) -> float:
    """How far two runs' metrics are apart, relative to their size; `inf` where one has others."""
    worst = 0.0
    for mine, other in zip(a, b, strict=True):
        names = {n for n in mine if not n.startswith(TIMED)}
        if names != {n for n in other if not n.startswith(TIMED)}:
            return math.inf
        for name in names:
            x, y = mine[name], other[name]
            if isinstance(x, int | float) and isinstance(y, int | float):
                worst = max(worst, abs(x - y) / max(abs(x), abs(y), 1e-3))
    return worst


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    """What a run left in `model/`, by name: each of its own shape."""
    files = sorted((Path(folder) / "model").glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


def step(setting: Setting) -> Figures:
    """Response tokens per second of each phase, and the share of the device's peak they used."""
    large: dict[str, Any] = {"steps": 3}
    if not setting.small:
        large |= {"steps": 4, "prompts_per_step": 64}
        large |= {"sampling": {"num_generations": 1, "max_completion_length": 512}}
    lines = done(run_of(setting, "step", **large))
    must(all(math.isfinite(line["loss"]) for line in lines), "a loss is not finite")
    must(all(line["grad_norm"] > 0 for line in lines), "a gradient is 0")
    rest = lines[1:]  # in the first step kernels are compiled
    names = [n for n in rest[-1] if n.startswith(("tokens_per_second/", "mfu/"))]
    found = {name: median(line[name] for line in rest) for name in names}
    must("tokens_per_second/learn" in found, "no speed was logged")
    return found | {
        "seconds of the first step": lines[0]["seconds/step"],
        "peak GiB": max(line["memory/peak_gib"] for line in lines),
        "mismatch, nats": max(line.get("sampling/mismatch", 0.0) for line in lines),
    }


def equal(setting: Setting) -> Figures:
    """A student whose teacher is itself has nothing to learn: loss and gradient are 0 to the
    bit.
    """
    found = {}
    kinds = {"opd": {"name": "opd", "support": "full"}, "forward KL": "gkd(beta=0.0)"}
    for name, method in kinds.items():
        values = run_of(setting, "equal", teacher=setting.model("student"), method=method, steps=1)
        (line,) = done(values)
        found[name] = line["grad_norm"]
        must(line["loss"] == 0 and line["grad_norm"] == 0, f"{name}: {line['grad_norm']:g}, not 0")
    return found


def ahead(setting: Setting) -> Figures:
    """A lag of one step on one device: the lag is what was asked for, and a run without is another
    one.
    """
    steps = 3
    plain, late = (
        done(run_of(setting, f"ahead{k}", ahead=k, steps=steps, method="opd")) for k in (0, 1)
    )
    lags = [line.get("lag/steps", 0.0) for line in late]
    must(lags == [0.0, 1.0, 1.0], f"lags {lags}, not 0, 1, 1")
    must(not any(line.get("lag/steps") for line in plain), "a lag where none was asked for")
    must(all(math.isfinite(line["loss"]) for line in late), "a loss is not finite")
    return {"lags": lags}


def offload(setting: Setting) -> Figures:
    """A teacher that is on the device only while it scores: the same numbers, less memory."""
    found = {}
    for away in (False, True):
        teacher = {"kind": "local", "model": setting.model("teacher"), "offload": away}
        setting.clean()
        lines = done(run_of(setting, f"offload{away}", teacher=teacher, steps=1))
        found[away] = lines
    apart = same(found[False], found[True])
    # a gradient is summed in no fixed order on a GPU
    must(apart < (1e-2 if setting.gpu else 1e-12), f"metrics differ by {apart:g}")
    here, away_peak = (max(line["memory/peak_gib"] for line in found[a]) for a in (False, True))
    return {"metrics apart": apart, "peak GiB here": here, "peak GiB away": away_peak}


def quantised(setting: Setting) -> Figures:
    """Teachers in 8 and 4 bits near the whole one, and a QLoRA student that learns."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed: pip install 'opdkit[quantize]'")
    found = {}
    for bits in (None, "8bit", "4bit"):
        teacher = {"kind": "local", "model": setting.model("teacher")}
        teacher |= {"quantize": bits} if bits else {}
        (line,) = done(run_of(setting, f"bits{bits}", teacher=teacher, steps=1))
        found[str(bits)] = line["teacher_kl/sampled"]
    whole = found["None"]
    for bits, most in (("8bit", 0.1), ("4bit", 0.5)):
        apart = abs(found[bits] - whole) / abs(whole)
        must(apart < most, f"with a teacher in {bits} the KL is {apart:.0%} off")
    lora = {"r": 4, "alpha": 8, "quantize": "4bit"}
    lines = done(run_of(setting, "qlora", lora=lora))
    must(
        all(math.isfinite(x["loss"]) and x["grad_norm"] > 0 for x in lines), "QLoRA learns nothing"
    )
    return {f"KL to the teacher, {bits}": kl for bits, kl in found.items()}


CHECKS = (
    Check("step", "one process, hf sampler: tokens/s and MFU by phase", 120, step),
    Check("equal models", "loss and gradient are 0 to the bit", 60, equal),
    Check("ahead", "a lag of one step in one process", 60, ahead),
    Check("offload", "a teacher that is away while it does not score", 60, offload),
    Check("quantised", "8 and 4 bits, and QLoRA", 90, quantised),
)
