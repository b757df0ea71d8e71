"""Programs that a model wrote, run where they can do no harm: see docs/rewards.md for what holds, and against what.

Each program runs in a process of its own that has given up the network, other processes, and all files but Python's own to read and
an empty folder to write; its tests run in another process and only exchange plain data with it. `jail/` holds those processes.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opdkit.errors import UserError

_JAIL = Path(__file__).with_name("jail")
NEEDED = ("network", "processes", "writing")  # without these no program runs, unless its owner says so
HELD = {
    "network": "no network: no socket can be opened",
    "processes": "no other processes: nothing can be forked or started, so nothing outlives a program",
    "writing": "no file is written, changed or removed outside the program's own folder",
    "reading": "no file is read but Python's own: its library, installed packages, shared libraries",
    "neighbours": "no other process is signalled, nor its environment or memory read",
}


@dataclass(frozen=True)
class Limits:
    """What a program may use. It is killed where it takes more, and fails its case."""

    seconds: int = 5  # of CPU, for the program and for its tests each; three times as many may pass
    memory: int = 1024  # MiB of address space, for each

    def __post_init__(self) -> None:
        for name, value, least in (("seconds", self.seconds, 1), ("memory", self.memory, 64)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"Limits({name}={value!r}) must be a whole number from {least} on: less lets no program start")


@dataclass(frozen=True)
class Calls:
    """A program, and tests that call its functions.

    sources: the program; the first of these that is Python. wanted: the program's names that tests see. before: code that tests
    begin with, overridden by those names; setup: code after them. tests: each passes where it raises nothing.
    """

    sources: tuple[str, ...]
    tests: tuple[str, ...]
    wanted: tuple[str, ...]
    before: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prints:
    """A program that reads its standard input, and what it must print for each."""

    sources: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """How many tests passed, of how many, and what was wrong with the first that did not."""

    passed: int
    total: int
    why: str = ""

    @property
    def right(self) -> bool:
        return self.passed == self.total


@dataclass(frozen=True)
class Sandbox:
    """Runs cases. workers: programs at once; 0: one per core. partial: go on after the first test that fails.

    unprotected: run programs also where they cannot be kept from writing files, the network and other processes.
    without: layers to leave out, for tests of the others.
    """

    limits: Limits = field(default_factory=Limits)
    workers: int = 0
    partial: bool = False
    unprotected: bool = False
    without: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse a machine on which programs cannot be confined."""
        _release(self.without, _take(self.without, self.unprotected))

    def run(self, cases: Sequence[Calls | Prints], tick: Callable[[int], object] = lambda done: None) -> list[Verdict]:
        """A verdict per case, in order. tick: called with the number of cases done."""
        self.check()
        done: dict[Calls | Prints, Verdict] = {}
        with ThreadPoolExecutor(min(self.workers or cores(), max(len(cases), 1))) as pool:
            futures = {pool.submit(self._judge, case): case for case in dict.fromkeys(cases)}  # equal ones once
            try:
                for future in as_completed(futures):
                    done[futures[future]] = future.result()
                    tick(len(cases) * len(done) // len(futures))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [done[case] for case in cases]

    def _judge(self, case: Calls | Prints) -> Verdict:
        with suppress(EOFError):  # such as where the machine ran out of memory: once more
            return self._ask(case)
        try:
            return self._ask(case)
        except EOFError:
            raise RuntimeError("the process that runs programs ended twice on one case; its message is above") from None

    def _ask(self, case: Calls | Prints) -> Verdict:
        worker = _take(self.without, self.unprotected)
        told = worker.ask(json.dumps({**asdict(case), **asdict(self.limits), "partial": self.partial}))
        _release(self.without, worker)
        return Verdict(told["passed"], len(case.tests if isinstance(case, Calls) else case.inputs), told["why"])


def cores() -> int:
    """The processors that this process may use, shared with the other ranks on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def protection() -> list[str]:
    """What keeps a program from doing harm on this machine, and what does not, a sentence each."""
    if sys.platform != "linux":
        return ["nothing: programs are confined by Linux, and this is another system"]
    worker = _take((), unprotected=True)
    _release((), worker)
    held, layers = worker.held, worker.layers
    means = [
        f"Landlock {layers['landlock']}" if layers["landlock"] else "no Landlock, so programs write no file at all",
        "seccomp" if layers["seccomp"] else "no seccomp",
        f"user {layers['user']}" if layers["user"] else "the same user",
    ]
    enforced = [text for name, text in HELD.items() if held.get(name)]
    missing = [f"NOT enforced: {text}" for name, text in HELD.items() if not held.get(name)]
    return [*enforced, *missing, "limits of memory, CPU time, wall time, file sizes and threads", f"by {', '.join(means)}"]


# -------------------------------------------------------------------------------------------------------------- workers


class _Worker:
    """One process that runs cases, one at a time."""

    def __init__(self, without: tuple[str, ...]) -> None:
        packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        options = {"paths": packages, "folder": tempfile.gettempdir(), "without": without}
        environment = {"PYTHONHASHSEED": "0"}  # the same program gives the same answer
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
            raise RuntimeError("the process that runs programs does not start; its message is above") from None
        self.held: dict[str, bool] = told["held"]
        self.layers: dict[str, Any] = told["layers"]
        self.base: str = told["base"]  # its folder

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, message: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            print(message, file=self.process.stdin, flush=True)
            return self._answer()
        except (EOFError, OSError):
            self.end()
            raise EOFError from None

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return dict(json.loads(line))

    def end(self) -> None:
        """It ends, with all that it started, where its input does."""
        if self.owner == os.getpid() and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
            self.process.wait()


_idle: dict[tuple[str, ...], deque[_Worker]] = {}


def _take(without: tuple[str, ...], unprotected: bool) -> _Worker:
    if sys.platform != "linux":
        raise UserError(
            "the reward 'code' runs programs that a model wrote, and only Linux can confine them: on this system they could "
            "read, change and send anything of yours. Score on Linux (a container or a virtual machine will do)"
        )
    worker = _waiting(without) or _Worker(without)
    missing = [HELD[name] for name in NEEDED if not worker.held.get(name)]
    if missing and not unprotected:
        _release(without, worker)
        raise UserError(
            "the reward 'code' runs programs that a model wrote, and on this machine they cannot be confined. Not enforced: "
            f"{'; '.join(missing)}. Use Linux on x86_64 or aarch64, in a container that allows seccomp filters; or, where nothing "
            "here is worth protecting, use a reward of your own file that is Code(unprotected=True)"
        )
    return worker


def _waiting(without: tuple[str, ...]) -> _Worker | None:
    """A worker that has nothing to do."""
    idle = _idle.setdefault(without, deque())
    with suppress(IndexError):
        while True:
            worker = idle.pop()
            if worker.alive:
                return worker
    return None


def _release(without: tuple[str, ...], worker: _Worker) -> None:
    _idle[without].append(worker)


@atexit.register
def _end() -> None:
    for without in _idle:
        while worker := _waiting(without):
            worker.end()
