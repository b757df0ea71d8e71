"""Runs in child processes that kill themselves at a chosen moment, and what a run leaves behind, to
compare.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MOMENTS = (
    "sampling",
    "rewarding",
    "between micro-batches",
    "before the optimiser",
    "after the optimiser",
    "before recording",
    "after recording",
)
# hold timings, the folder's name, digests of a zip file
NOT_COMPARED = (
    "report.html",
    "run.yaml",
    "run.json",
    "manifest.json",
    "origin.jsonl",
    "timeline.jsonl",
)


def in_child(
    values: dict[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    moment: str = "",
    step: int = 0,
) -> int:
    """Trains in a forked process; its exit code, -9 where it killed itself at the moment of the
    step (counted from 1).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__, "opdkit.run.launch", "transformers.models.qwen3.modeling_qwen3", "peft"]
    )
    child = context.Process(target=_train, args=(values, resume, overwrite, moment, step))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _train(values: dict[str, Any], resume: bool, overwrite: bool, moment: str, step: int) -> None:
    from opdkit.run.launch import execute
    from opdkit.run.settings import make_run

    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if moment:
        _arm(moment, step)
    execute(make_run(values), resume=resume, overwrite=overwrite)


def _arm(moment: str, step: int) -> None:
    """Kills this process at a moment of a step."""
    from opdkit.sampling import decode
    from opdkit.train import checkpoint, loop
    from opdkit.train.collect import collect
    from opdkit.train.record import Recorder
    from opdkit.train.student import Student

    now = 0

    def count(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(job: Any, state: Any) -> None:
            nonlocal now
            now = state.step + 1
            real(job, state)

        return counted

    def deadly(real: Callable[..., Any], calls: int, after: bool) -> Callable[..., Any]:
        seen = 0

        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += now == step
            if now == step and seen == calls and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if now == step and seen == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return called

    # owner, function, which call of the step, whether after it
    where: dict[str, tuple[Any, str, int, bool]] = {
        "sampling": (decode, "choose", 3, False),
        "rewarding": (collect, "score", 1, False),
        "between micro-batches": (loop, "learn", 2, False),
        "before the optimiser": (Student, "step", 1, False),
        "after the optimiser": (Student, "step", 1, True),
        "before recording": (Recorder, "step", 1, False),
        "after recording": (Recorder, "step", 1, True),
        "writing a checkpoint": (checkpoint, "_finish", 1, False),
    }
    owner, name, calls, after = where[moment]
    setattr(owner, name, deadly(getattr(owner, name), calls, after))
    # a step that never gets to the moment (it samples nothing, selects nothing) ends here
    if moment != "writing a checkpoint":
        Recorder.step = deadly(Recorder.step, 1, True)  # type: ignore[method-assign]
    loop.train_step = count(loop.train_step)


def left_by(folder: Path) -> dict[str, Any]:
    """Every file of a run by name: what it says, timings apart."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in NOT_COMPARED]
    return {str(path.relative_to(folder)): _content(path) for path in files}


def _content(path: Path) -> Any:
    from opdkit.train.record import TIMINGS

    if path.suffix == ".pt":
        return _flat(torch.load(path, weights_only=True))
    if path.name in ("metrics.jsonl", "evals.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [
            {k: v for k, v in line.items() if not k.startswith((*TIMINGS, "seconds"))}
            for line in lines
        ]
    if path.name == "adapter_config.json":  # peft writes its set of layers in any order
        return {
            k: sorted(v) if isinstance(v, list) else v
            for k, v in json.loads(path.read_text()).items()
        }
    return path.read_bytes()


def _flat(value: Any) -> Any:
    """Nested tensors as bytes, which compare bit for bit."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {k: _flat(v) for k, v in value.items()}
    return [_flat(v) for v in value] if isinstance(value, (list, tuple)) else value


def assert_same(folder: Path, other: Path) -> None:
    """Two runs left the same, bit for bit."""
    a, b = left_by(folder), left_by(other)
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name] == b[name], f"{name} differs"
