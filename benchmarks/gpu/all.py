"""Every check of this repository that needs a GPU, in less than 12 minutes, on 1 to 8 of them.

    python benchmarks/gpu/all.py                      # prints a table, writes results/gpu.json
    python benchmarks/gpu/all.py --only kernels step  # some of them, by name
    python benchmarks/gpu/all.py --small --device cpu # the same code in small shapes, without a GPU

Checks run one after the other in a process of their own, those that say most first. One that fails,
hangs or ends its process does not stop the others; one that cannot be done here is left out, and
says why. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import arithmetic
import engines
import ranks
import runs
import torch
from common import parser, save, table
from setting import Check, Outcome, Setting, Wrong, outcome

BUDGET = 690.0  # seconds of all, less than 12 minutes with what is around them
SLOW = 4.0  # times: a CPU, which others may use too
LEAST = 5.0  # with less than that no check is begun
START = 120.0  # that a worker may take to start
GRACE = 5.0  # in which what a hanging check has started ends by itself
WIDTH = 150  # characters of a table's last column; the JSON file has all
TOLD = "told: "  # begins a worker's line about a check
NAMED = {c.name: c for room in (arithmetic, runs, ranks, engines) for c in room.CHECKS}
ORDER = (  # those that say most come first
    *("kernels", "step", "equal models", "memory of the pass", "processes", "resume"),
    *("vLLM engine", "vLLM server", "number types", "rankings", "speed of processes", "ahead"),
    *("offload", "quantised", "Ray"),
)
CHECKS = tuple(NAMED[name] for name in ORDER)


def here(args: argparse.Namespace, checks: list[Check], setting: Setting) -> list[Outcome]:
    """One after the other in this process."""
    end = time.monotonic() + args.budget
    return [
        outcome(check, setting)
        if time.monotonic() < end
        else Outcome(check.name, "skip", 0.0, f"no time is left of {args.budget:g} s")
        for check in checks
    ]


def apart(args: argparse.Namespace, checks: list[Check], setting: Setting) -> list[Outcome]:
    """One after the other in a worker, which is ended where a check takes too long, and started
    again for the next.
    """
    left, results = list(checks), list[Outcome]()
    end = time.monotonic() + args.budget
    with contextlib.ExitStack() as running:
        worker: _Worker | None = None
        while left:
            check = left.pop(0)
            room = min(check.seconds * (SLOW if setting.small else 1), end - time.monotonic())
            if room < LEAST:
                results.append(
                    Outcome(check.name, "skip", 0.0, f"no time is left of {args.budget:g} s")
                )
                continue
            worker = worker or running.enter_context(_Worker(args, [check, *left], setting))
            results.append(worker.next(check, room))
            print(_line(results[-1]), flush=True)
            if not worker.alive:
                running.close()
                worker = None
    return results


class _Worker:
    """A process that does checks and tells of each as it ends."""

    def __init__(self, args: argparse.Namespace, checks: list[Check], setting: Setting):
        command = [sys.executable, __file__, "--worker", str(setting.folder)]
        command += ["--device", setting.device, "--seed", str(setting.seed)]
        command += ["--small"] if setting.small else []
        command += ["--threads", str(args.threads)] if args.threads else []
        self.process = subprocess.Popen(
            [*command, "--only", *(check.name for check in checks)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # what it starts ends with it
        )
        self.told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.said: list[str] = []
        self.alive = True
        for target in (self._listen, self._note):
            threading.Thread(target=target, daemon=True).start()

    def __enter__(self) -> _Worker:
        self._hear(START)
        return self

    def __exit__(self, *error: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
                time.sleep(GRACE if not self.alive and number == signal.SIGTERM else 0)
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(TOLD):
                self.told.put(line.removeprefix(TOLD))
        self.told.put(None)

    def _note(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said = [*self.said[-20:], line]

    def _hear(self, room: float) -> str:
        """What it tells next, within so many seconds."""
        try:
            told = self.told.get(timeout=max(room, 1.0))
        except queue.Empty:
            self.alive = False
            raise Wrong(f"took longer than {room:.0f} s") from None
        if told is None:
            self.alive = False
            raise Wrong(f"its process ended: {''.join(self.said)[-1500:]}")
        return told

    def next(self, check: Check, room: float) -> Outcome:
        """How a check ended."""
        start = time.monotonic()
        try:
            return Outcome(**json.loads(self._hear(room)))
        except Wrong as why:
            return Outcome(check.name, "fail", time.monotonic() - start, str(why))


def work(args: argparse.Namespace) -> None:
    """As a worker: tells of each check as it ends."""
    setting = _setting(args, Path(args.worker))
    print(TOLD + "ready", flush=True)
    for name in args.only:
        print(TOLD + json.dumps(asdict(outcome(NAMED[name], setting))), flush=True)


def _setting(args: argparse.Namespace, folder: Path) -> Setting:
    gpus = torch.cuda.device_count() if args.device.startswith("cuda") else 0
    return Setting(args.device, args.small, gpus, folder, args.seed)


def _line(found: Outcome) -> str:
    return f"{found.result:4}  {found.name}  {found.seconds:.1f} s  {found.reason[:300]}".rstrip()


def _short(figures: dict[str, Any]) -> str:
    """Figures in a cell of a table; the whole is in the JSON file."""
    words = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    ]
    return ", ".join(words)[:WIDTH]


def main(argv: list[str] | None = None) -> Any:
    options = parser(__doc__)
    options.add_argument("--small", action="store_true", help="small shapes, seconds on a CPU")
    options.add_argument("--only", nargs="*", choices=list(NAMED), metavar="NAME", default=ORDER)
    options.add_argument("--budget", type=float, default=BUDGET, help="seconds of all together")
    options.add_argument("--inside", action="store_true", help="all in this process")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.worker is not None:
        work(args)
        return None
    checks = [NAMED[name] for name in ORDER if name in args.only]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="opdkit-gpu-") as folder:
        setting = _setting(args, Path(folder))
        results = (here if args.inside else apart)(args, checks, setting)
    rows = [
        [r.result, r.name, f"{r.seconds:.1f}", r.reason.split("\n")[0][:WIDTH] or _short(r.figures)]
        for r in results
    ]
    table(["result", "check", "seconds", "figures, or why"], rows)
    seconds = time.monotonic() - start
    print(f"\n{seconds:.0f} s in all on {setting.gpus} GPUs" if setting.gpu else "")
    found = {"seconds": seconds, "gpus": setting.gpus, "checks": [asdict(r) for r in results]}
    return save("gpu", args, found)


if __name__ == "__main__":
    whole = main()
    if whole is not None and any(c["result"] == "fail" for c in whole["checks"]):
        sys.exit(1)
