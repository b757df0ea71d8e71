"""The training step of two checkouts, side by side: is the new one slower?

    python benchmarks/step.py OLD NEW

OLD and NEW are folders with a checkout each, whose `.venv/bin/python` runs its side where there is
one (`--python OLD_PYTHON NEW_PYTHON` says otherwise). Each side is a process that trains the same
models on the same prompts; they take turns, and the ratios of the pairs are what counts: a machine
that slows down slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import (
    alternate,
    begin,
    parser,
    questions,
    qwen3,
    ratios,
    save,
    spread,
    stopping,
    table,
    text,
    tokenizer,
)

PHASES = ("sample", "reward", "score", "learn")
CLOSE = 1e-5  # relative; losses of the same step on both sides
SIZES: dict[str, dict[str, int]] = {  # models, rollouts and tokens; steps of one turn
    "tiny": {"hidden": 64, "layers": 2, "vocab": 320, "rollouts": 8, "length": 16, "steps": 5},
    "medium": {"hidden": 256, "layers": 4, "vocab": 8192, "rollouts": 16, "length": 32, "steps": 1},
}


# ------------------------------------------------------------------------------------------ a side


class Steps:
    """A run of opd over the whole vocabulary, a few steps at a time."""

    def __init__(self, size: Mapping[str, int], args: argparse.Namespace, folder: Path):
        from opdkit.run.build import prepare
        from opdkit.run.open import Given
        from opdkit.run.settings import make_run

        torch.manual_seed(args.seed)
        with torch.device(args.device):
            student, teacher = (
                stopping(qwen3(size["hidden"], size["layers"], size["vocab"], initial=0.08), 0.02)
                for _ in range(2)
            )
        run = make_run(
            {
                "student": "student",
                "teacher": "teacher",
                "data": "in memory",
                "method": {"name": "opd", "support": "full"},
                "output": str(folder / "run"),
                "steps": 10**3,
                "prompts_per_step": size["rollouts"],
                "sampling": {"num_generations": 1, "max_completion_length": size["length"]},
                "optim": {"learning_rate": 1e-4},
                "device": args.device,
                "keep_samples": 0,
                "seed": args.seed,
            }
        )
        run.folder.mkdir(parents=True)
        texts = questions(size["rollouts"], size["vocab"], args.seed)
        rows = [{"id": str(i), "prompt": words} for i, words in enumerate(texts)]
        given = Given(
            student=student,
            teacher=teacher.requires_grad_(False),
            tokenizer=tokenizer(size["vocab"]),
            rows=rows,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self.job, self.state = prepare(run, given)
        self.lines: list[Mapping[str, float]] = []
        self.job.recorder.show = lambda step, metrics: self.lines.append(dict(metrics))

    def take(self, steps: int) -> dict[str, Any]:
        """Seconds per step, in all and of each phase, and the losses."""
        from opdkit.train.loop import train_step

        self.lines.clear()
        start = time.perf_counter()
        for _ in range(steps):
            train_step(self.job, self.state)
        seconds = (time.perf_counter() - start) / steps
        phases = {p: sum(m.get(f"seconds/{p}", 0.0) for m in self.lines) / steps for p in PHASES}
        other = seconds - sum(phases.values())
        losses = [m["loss"] for m in self.lines]
        return {"seconds": seconds, "losses": losses, "other": other, **phases}


def side(args: argparse.Namespace, asked: Iterable[str], out: TextIO) -> None:
    """As one of the two: each line that is asked, `SIZE STEPS`, is answered by one of JSON."""
    import opdkit

    print(json.dumps({"opdkit": opdkit.__file__}), file=out, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Steps] = {}
        for line in asked:
            name, steps = line.split()
            if name not in made:
                made[name] = Steps(SIZES[name], args, Path(folder) / name)
            print(json.dumps(made[name].take(int(steps))), file=out, flush=True)


# --------------------------------------------------------------------------------------- both sides


class Side:
    """A checkout's process."""

    def __init__(self, checkout: Path, python: str, args: argparse.Namespace):
        command = [python, __file__, str(checkout), str(checkout), "--side"]
        command += ["--device", args.device, "--seed", str(args.seed)]
        command += ["--threads", str(args.threads)] if args.threads else []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout)},
        )
        found = Path(self._told()["opdkit"])
        if checkout.resolve() not in found.resolve().parents:
            raise SystemExit(f"{python} imports {found}, which is not of the checkout {checkout}")

    def _told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with {self.process.wait()}")
        return json.loads(line)

    def take(self, name: str, steps: int) -> dict[str, Any]:
        """Steps of a size."""
        assert self.process.stdin is not None
        print(name, steps, file=self.process.stdin, flush=True)
        return self._told()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def python_of(checkout: Path) -> str:
    """That of the checkout's own environment, else the one that runs this."""
    own = checkout / ".venv" / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def compare(name: str, sides: Mapping[str, Side], args: argparse.Namespace) -> dict[str, Any]:
    """The sides in turns, on one size."""
    steps = args.steps or SIZES[name]["steps"]
    takes = {who: lambda who=who: sides[who].take(name, steps) for who in sides}
    found = alternate(takes, args.pairs)
    for old, new in zip(found["old"], found["new"], strict=True):
        for a, b in zip(old["losses"], new["losses"], strict=True):
            if abs(a - b) > CLOSE * max(abs(a), abs(b)):
                raise SystemExit(f"{name}: losses {a:.8g} and {b:.8g} of the same step differ")
    result: dict[str, Any] = {"steps": steps}
    for what in ("seconds", *PHASES, "other"):
        old, new = ([turn.get(what, 0.0) for turn in found[who]] for who in ("old", "new"))
        if min(old) > 0 and min(new) > 0:
            result[what] = {"old": spread(old), "new": spread(new), "ratio": ratios(new, old)}
    return result


def main(argv: list[str] | None = None) -> Any:
    options = parser(__doc__)
    options.add_argument("checkouts", type=Path, nargs=2, metavar=("OLD", "NEW"))
    options.add_argument("--python", nargs=2, metavar=("OLD_PYTHON", "NEW_PYTHON"))
    options.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    options.add_argument("--steps", type=int, help="of one turn; default: by size")
    options.add_argument("--pairs", type=int, default=10)
    options.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    begin(args)
    if args.side:
        return side(args, sys.stdin, sys.stdout)
    pythons = args.python or [python_of(checkout) for checkout in args.checkouts]
    who = ("old", "new")
    sides = {n: Side(c.resolve(), p, args) for n, c, p in zip(who, args.checkouts, pythons)}
    try:
        found = {name: compare(name, sides, args) for name in args.sizes}
    finally:
        for one in sides.values():
            one.close()
    report(found)
    args.checkouts = [str(checkout) for checkout in args.checkouts]
    return save("step", args, {"sizes": found})


def report(found: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [
        [name, what, *(text(of[who], 4) for who in ("old", "new")), text(of["ratio"], 3)]
        for name, size in found.items()
        for what, of in size.items()
        if what != "steps"
    ]
    table(["size", "seconds of", "old", "new", "new / old"], rows)


if __name__ == "__main__":
    main()
