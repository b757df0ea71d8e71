"""Calls that a model's output can hang or crash, such as sympy on 9^9^9^9: made in another process, with a limit.

A signal would not do: it works only in the main thread, and not while Python is inside one long multiplication.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 5.0  # for one call
START_SECONDS = 120.0  # to import sympy from a cold disk
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Failed:
    """A call that raised, ran too long or took its process down."""

    why: str


def guarded(function: str, *arguments: Any, seconds: float = SECONDS) -> Any:
    """What `worker.py`'s function returns, or `Failed`. Threads may call it at once; each then has a process of its own."""
    idle = _idle.setdefault(function, deque())
    process = _take(function, idle)
    answer = process.call(function, arguments, seconds)
    if process.alive:
        idle.append(process)
    return answer


class _Process:
    """One worker and its two pipes."""

    def __init__(self) -> None:
        # By path and not as a module: neither opdkit nor torch is imported, and this folder's math.py does not hide Python's.
        run = f"import runpy, sys; sys.path[:1] = []; runpy.run_path({str(_WORKER)!r}, run_name='__main__')"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.owner = os.getpid()  # a fork must not talk through its parent's pipes
        self.alive = True
        self.process = subprocess.Popen(
            [sys.executable, "-c", run],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""},
        )

    def call(self, function: str, arguments: tuple[Any, ...], seconds: float) -> Any:
        """The result; a process that fails to give one in time is ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = threading.Timer(seconds, self.end)
        timer.start()
        try:
            pickle.dump((function, arguments), self.process.stdin)
            self.process.stdin.flush()
            good, value = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.end()
            return Failed(f"no result within {seconds:g} s or in the memory allowed")
        finally:
            timer.cancel()
            timer.join()  # it must not end the process during the next call
        return value if good else Failed(value)

    def end(self) -> None:
        self.alive = False
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


_idle: dict[str, deque[_Process]] = {}  # by function: each imports only what its function needs


def _take(function: str, idle: deque[_Process]) -> _Process:
    """An idle worker, or a new one that has answered once: its imports are not on the first call's clock."""
    while idle:
        process = idle.pop()
        if process.owner == os.getpid() and process.process.poll() is None:
            return process
    process = _Process()
    ready = process.call("ready", (function,), START_SECONDS)
    if ready is not True:
        process.end()
        raise RuntimeError(f"the process that scores answers does not start: {ready}")
    return process


@atexit.register
def _end() -> None:
    for idle in _idle.values():
        while idle:
            idle.pop().end()
