"""A model that teaches itself: it writes careless sums, but copies well when a worked solution
stands before the question; what it can do with the solution it learns to do without, and no second
model takes part.

    python examples/self_teacher.py --method opsd --seed 0 --out runs/self_teacher

The task is the quickstart's (written addition). Prints the accuracy on held-out problems before and
after, and of the same weights with the solution in sight.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from opdkit.base.files import write_rows
from opdkit.base.progress import progress
from opdkit.data.views import of_row, view_of
from opdkit.recipes import arithmetic
from opdkit.recipes.quickstart import GREEDY, OPD, REWARD
from opdkit.run.launch import execute
from opdkit.run.settings import make_run
from opdkit.types import DataRow

VIEW = (
    "{solution}\n{prompt}"  # what the teacher reads: the tokenizer knows digits, +, = and newline
)
STEPS, BATCH, RATE = 900, 32, 4e-3  # of the training that makes the student
HELD_OUT = 256


def solved(row: DataRow) -> DataRow:
    """A row with its right worked solution beside it."""
    a, b = map(int, row["prompt"].rstrip("=").split("+"))
    return {**row, "solution": arithmetic.written(a, b, random.Random(0))}


def seen(row: DataRow) -> DataRow:
    """A row whose question is as the teacher reads it."""
    return view_of(VIEW).row(of_row(solved(row))) or row


def student(folder: Path, seed: int) -> str:
    """A model that learnt careless sums, and to copy a solution that it is shown; the one that is
    there already, where there is one.
    """
    if folder.exists():
        return str(folder)
    tokenizer = arithmetic.tokenizer()
    model = arithmetic.model("student", len(tokenizer), seed)
    careless = arithmetic.problems(STEPS * BATCH // 4, seed, forget=0.7)
    shown = [
        {**seen(row), "response": solved(row)["solution"]}
        for row in arithmetic.problems(3 * STEPS * BATCH // 4, seed + 100)
    ]
    with progress("Training the student", total=STEPS, unit="steps") as tick:
        arithmetic.pretrain(
            model,
            tokenizer,
            careless + shown,
            STEPS,
            BATCH,
            RATE,
            seed,
            lambda step, loss: tick(step),
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--method", default="opsd")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--steps", type=int, default=60)
    asked.add_argument("--out", type=Path, default=Path("runs/self_teacher"))
    given = asked.parse_args()
    rows = [solved(row) for row in arithmetic.problems(4096, given.seed + 1)]
    tests = [solved(row) for row in arithmetic.problems(HELD_OUT, given.seed, held=True)]
    for row in rows:
        del row["response"]  # the student never learns from a text that it did not write
    values: dict[str, Any] = {
        "student": student(given.out / f"student-{given.seed}", given.seed),
        "data": write_rows(given.out / "train.jsonl", rows),
        "method": given.method,
        "teacher": {"view": VIEW},
        "output": str(given.out / f"{given.method}-{given.seed}"),
        "reward": REWARD,
        "evaluate": {"data": write_rows(given.out / "test.jsonl", tests), "sampling": GREEDY},
        "checkpoint": {"every": 0},
        "seed": given.seed,
        **OPD,
        "steps": given.steps,
    }
    result = execute(make_run(values), overwrite=True)
    accuracy = {e.step: e.avg_at_k.value for e in result.evaluations if e.name == "student"}
    print(json.dumps({"method": given.method, "seed": given.seed, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
