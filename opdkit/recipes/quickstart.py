"""The whole story on a CPU, offline, in minutes: make a teacher and a weak student, distil,
evaluate, report.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from opdkit.base.files import write_json, write_rows
from opdkit.base.lock import locked
from opdkit.base.progress import progress
from opdkit.methods.method import as_method
from opdkit.recipes import arithmetic
from opdkit.report import write_report
from opdkit.run.launch import execute
from opdkit.run.settings import make_run
from opdkit.train import checkpoint as checkpoints

HELD_OUT = 512  # problems of the evaluation
OPD: dict[str, Any] = {
    "steps": 100,
    "prompts_per_step": 32,
    "sampling": {"num_generations": 4, "max_completion_length": 64},
    "optim": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 5, "betas": [0.9, 0.95]},
}
GREEDY = {"temperature": 0.0, "max_completion_length": 64}
REWARD = r"regex:=(\d+)$"
WORLD = Path("runs/quickstart")


def quickstart(out: Path, *, seed: int = 0, method: str = "opd") -> dict[str, Any]:
    """Teacher, student, on-policy distillation, evaluation and report in `out`; returns what
    `out/summary.json` holds.

    The summary: accuracies of teacher, student before and student after on held-out problems,
    seconds, method.
    """
    began = time.perf_counter()
    as_method(method)  # a wrong name is an error now, not after the teacher has been trained
    with locked(out):
        pass  # a folder that cannot be written, or is another's, is an error now too
    tokenizer = arithmetic.tokenizer()
    for size in ("teacher", "student"):
        folder = out / "models" / size
        model = _trained(size, tokenizer, seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    asked = OPD["steps"] * OPD["prompts_per_step"]
    train = write_rows(out / "data" / "train.jsonl", arithmetic.problems(asked, seed + 1))
    test = write_rows(out / "data" / "test.jsonl", arithmetic.problems(HELD_OUT, seed, held=True))
    run = make_run(
        {
            "student": str(out / "models" / "student"),
            "teacher": str(out / "models" / "teacher"),
            "data": train,
            "method": method,
            "output": str(out),
            "reward": REWARD,
            "evaluate": {"data": test, "teacher": True, "sampling": GREEDY},
            "checkpoint": {"every": 0},
            "seed": seed,
            **OPD,
        }
    )
    result = execute(run, overwrite=True)
    accuracy = {(e.name, e.step): e.avg_at_k.value for e in result.evaluations}
    summary = {
        "teacher": accuracy["teacher", 0],
        "student_before": accuracy["student", 0],
        "student_after": accuracy["student", run.steps],
        "seconds": round(time.perf_counter() - began, 1),
        "method": method,
    }
    write_json(out / "summary.json", summary)
    report = write_report(out)
    print(json.dumps(summary))
    print(f"report  {report}\nmodel   {result.model}", file=sys.stderr)
    return summary


def recipe(folder: Path = WORLD) -> dict[str, Any]:
    """The quickstart's world as the settings of a run of half a minute, short enough that methods
    still differ at its end.

    Its models and data are where `make` puts them in `folder`: one teacher and one student, so that
    seeds vary prompts and draws alone.
    """
    return {
        "student": str(folder / "models" / "student"),
        "teacher": str(folder / "models" / "teacher"),
        "data": str(folder / "data" / "train.jsonl"),
        "output": str(folder / "run"),
        "reward": REWARD,
        "evaluate": {
            "data": str(folder / "data" / "test.jsonl"),
            "every": 5,
            "teacher": True,
            "sampling": GREEDY,
        },
        **OPD,
        "steps": 40,
    }


def make(folder: Path = WORLD) -> None:
    """What `recipe` refers to, unless it is there already."""
    tokenizer = arithmetic.tokenizer()
    write_rows(folder / "data" / "train.jsonl", arithmetic.problems(8192, 1))
    write_rows(folder / "data" / "test.jsonl", arithmetic.problems(256, 0, held=True))
    for size in ("teacher", "student"):
        place = folder / "models" / size
        if not place.exists():
            write = partial(
                checkpoints.write_model, model=_trained(size, tokenizer, 0), tokenizer=tokenizer
            )
            checkpoints.put(place, write)


def _trained(size: str, tokenizer: Any, seed: int) -> Any:
    """A model trained from scratch, with its progress."""
    with progress(f"Training the {size}", total=arithmetic.SIZES[size].steps, unit="steps") as tick:
        return arithmetic.start(size, tokenizer, seed, lambda step, loss: tick(step))
