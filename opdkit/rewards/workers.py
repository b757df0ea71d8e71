"""Processes that deal with what a model wrote, and are confined before they do: `jail/` holds what
they run.

Each worker is a process of ours that splits off a confined one per case; workers that have nothing
to do are kept for the next.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.base.errors import UserError

_JAIL = Path(__file__).with_name("jail")
# without these nothing of a model's is dealt with, unless its owner says so
NEEDED = ("network", "processes", "writing")
DOES = {
    "programs": "runs programs that a model wrote",
    "functions": "reads what a model wrote with code of your own",
    "scores": "has libraries read what a model wrote, some of which evaluate it as Python",
}
HELD = {
    "network": "no network: no socket can be opened",
    "processes": "no other processes: nothing can be forked or started, so nothing outlives a "
    "program",
    "writing": "no file is written, changed or removed outside the program's own folder",
    "reading": "no file is read but Python's own: its library, installed packages, shared "
    "libraries",
    "seeing": "no other file is seen: neither that it is there, nor its size or times",
    "disk": "no more than 64 MiB and 1000 files are written, or none at all",
    "neighbours": "no other process is signalled, nor its environment or memory read",
}


@dataclass(frozen=True)
class ConfinedWork:
    """What to do with what a model wrote: `work` is a file of `jail/`, `given` what it is told at
    its start.

    reward: whose name errors say; otherwise: what one does to go without. unprotected: go on where
    it cannot be kept from writing files, the network and other processes. without: layers to leave
    out, for tests of the others. Threads may ask at once; each then has a process of its own.
    """

    work: str
    reward: str
    otherwise: str
    given: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    unprotected: bool = False

    def check(self) -> None:
        """Refuse a machine on which nothing can be confined."""
        self._release(self._take())

    def ask(self, message: str) -> Any:
        """What the worker answers to a line."""
        with suppress(EOFError):  # such as where the machine ran out of memory: once more
            return self._ask(message)
        try:
            return self._ask(message)
        except EOFError:
            raise RuntimeError(
                f"the process behind the reward {self.reward!r} ended twice on one case; its "
                "message is above"
            ) from None

    def _ask(self, message: str) -> Any:
        worker = self._take()
        told = worker.ask(message)
        self._release(worker)
        return told

    @property
    def idle(self) -> deque[Worker]:
        return _idle.setdefault((self.work, self.given, self.without), deque())

    def _release(self, worker: Worker) -> None:
        self.idle.append(worker)

    def _take(self) -> Worker:
        what = f"the reward {self.reward!r} {DOES[self.work]}"
        if sys.platform != "linux":
            raise UserError(
                f"{what}, and only Linux can confine that: on this system a response could read, "
                "change and send anything of yours. Score on Linux (a container or a virtual "
                "machine will do)"
            )
        worker = _waiting(self.idle) or Worker(self)
        missing = [HELD[name] for name in NEEDED if not worker.held.get(name)]
        if missing and not self.unprotected:
            self._release(worker)
            raise UserError(
                f"{what}, and on this machine that cannot be confined. Not enforced: "
                f"{'; '.join(missing)}. Use Linux on x86_64 or aarch64, in a container that allows "
                f"seccomp filters; or, where nothing here is worth protecting, {self.otherwise}"
            )
        return worker


def unprotected(own: str) -> str:
    """What one does to go without confinement. own: the reward's class."""
    return f"use a reward of your own file that is {own}(unprotected=True)"


def cores() -> int:
    """The processors that this process may use, shared with the other ranks on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def protection() -> list[str]:
    """What keeps a program from doing harm on this machine, and what does not, a sentence each."""
    if sys.platform != "linux":
        return ["nothing: programs are confined by Linux, and this is another system"]
    jail = ConfinedWork("programs", "code", unprotected("Code"), unprotected=True)
    worker = jail._take()
    jail._release(worker)
    held, layers = worker.held, worker.layers
    means = [
        f"Landlock {layers['landlock']}"
        if layers["landlock"]
        else "no Landlock, so programs write no file at all",
        "seccomp" if layers["seccomp"] else "no seccomp",
        f"user {layers['user']}" if layers["user"] else "the same user",
        "mounts of its own" if layers["mounts"] else "no mounts of its own",
    ]
    enforced = [text for name, text in HELD.items() if held.get(name)]
    missing = [f"NOT enforced: {text}" for name, text in HELD.items() if not held.get(name)]
    return [
        *enforced,
        *missing,
        "limits of memory, CPU time, wall time, file sizes and threads",
        f"by {', '.join(means)}",
    ]


class Worker:
    """One process that deals with cases, one at a time."""

    def __init__(self, jail: ConfinedWork) -> None:
        packages = [
            path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")
        ]
        options = {
            "work": jail.work,
            "for": jail.given,
            "paths": packages,
            "folder": tempfile.gettempdir(),
            "without": jail.without,
        }
        environment = {"PYTHONHASHSEED": "0"}  # the same program gives the same answer
        environment |= dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
        )  # a process that forks has one
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.owner = os.getpid()  # a fork must not talk through its parent's pipes
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-X", "utf8", str(_JAIL), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # an interrupt at the terminal is for us to deal with
            text=True,
        )
        try:
            told = self._answer()
        except EOFError:
            raise RuntimeError(
                "the process that deals with what a model wrote does not start; its message is "
                "above"
            ) from None
        self.held: dict[str, bool] = told["held"]
        self.layers: dict[str, Any] = told["layers"]
        self.base: str = told["base"]  # its folder

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, message: str) -> Any:
        assert self.process.stdin is not None
        try:
            print(message, file=self.process.stdin, flush=True)
            return self._answer()
        except (EOFError, OSError):
            self.end()
            raise EOFError from None

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def end(self) -> None:
        """It ends, with all that it started, where its input does."""
        if self.owner == os.getpid() and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
            self.process.wait()


_idle: dict[tuple[str, tuple[str, ...], tuple[str, ...]], deque[Worker]] = {}


def _waiting(idle: deque[Worker]) -> Worker | None:
    """A worker that has nothing to do."""
    with suppress(IndexError):
        while True:
            worker = idle.pop()
            if worker.alive:
                return worker
    return None


@atexit.register
def _end() -> None:
    for idle in _idle.values():
        while worker := _waiting(idle):
            worker.end()
