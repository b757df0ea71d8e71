"""Scores answers one by one with a library's own scorer: each in a confined process of its own,
which then ends.

What an answer could do to a scorer, such as replacing a function of it, ends with that process.
What an answer could have done to the score itself is refused before: a library that evaluates an
answer as Python gets to evaluate arithmetic only (`arithmetic.py`).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import signal
import time
import types
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import checks
from arithmetic import only_arithmetic
from cell import Jail, begun, child, kill, read
from lock import CONFINED

LONGEST = 1 << 20  # bytes of a scorer's result
MEMORY = 4096  # MiB of address space: 9^9^9^9 must fail, not fill the machine
# A call may use `seconds` of a processor. On a busy machine more pass: it is killed after WALL
# seconds and SLOWER times as long.
WALL, SLOWER = 2.0, 10
# Read and compared once at the start: libraries then have ready what they build at their first use,
# such as a parser's tables.
SAMPLES = (
    (r"\frac{3\sqrt{2}}{2}", r"\frac{3}{\sqrt{2}}"),
    (r"(x-1)(x+1)", r"x^2-1"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"\{1, 2\}", r"1,2"),
    (r"[0, 1) \cup (2, \infty)", r"x \ge 2"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\sin(x) + \log_2(8) - e^{2x}", r"2^{10} - |y| + 5!"),
    (r"10\%", r"0.1"),
)


def equal(answer: str, said: str) -> bool:
    """Whether two LaTeX expressions are the same, by math-verify."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Only LaTeX, whole: the plain-number extraction would find the 5 in "5 or 6". Limits are this
    # folder's business.
    how = [LatexExtractionConfig()]
    golds, tries = (
        parse(rf"\boxed{{{text}}}", how, parsing_timeout=None) for text in (answer, said)
    )
    return verify(golds, tries, timeout_seconds=None)


@lru_cache(maxsize=64)
def dataset(task: str, config: str) -> Any:
    """A task of reasoning-gym, made of the row's settings alone.

    It scores an entry of its own: what that builds is there from then on.
    """
    import reasoning_gym

    made = reasoning_gym.create_dataset(task, **json.loads(config))
    with suppress(Exception):
        made.score_answer(made[0]["answer"], made[0])
    return made


def math(answer: str, said: str) -> Callable[[], bool]:
    return lambda: equal(answer, said)


def gym(task: str, config: dict[str, Any], entry: dict[str, Any], said: str) -> Callable[[], float]:
    scorer = dataset(task, json.dumps(config))
    source = str((entry["metadata"] or {}).get("source_dataset", task))  # composite has several
    return lambda: checks.scored(source, said, entry, scorer)


def warm(library: str) -> None:
    """Import the library, and have it build what it builds once."""
    logging.disable(logging.WARNING)  # math-verify warns that its own limits are off: ours hold
    if library == "gym":
        __import__("reasoning_gym")
        return
    for answer, said in SAMPLES:
        equal(answer, said)


def _size() -> int:
    """The address space of this process, MiB: a library may have taken much of it."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE") >> 20


class Split:
    """Work that is done in a confined process of its own, for each call."""

    accepts: type | types.UnionType = list  # what it comes to

    def __init__(self, jail: Jail) -> None:
        self.jail = jail

    def score(self, work: Callable[[], Any], seconds: float) -> list[Any]:
        """[True, the value], [False, why there is none], or [None, why] where it ran too long."""
        output, write = os.pipe()
        with self.jail:
            pid = child(lambda: self._confined(work, seconds), [write])
            os.close(write)
            try:
                begun(output)
                end = time.monotonic() + WALL + SLOWER * seconds
                said, stopped = read(output, LONGEST, end)
            finally:
                kill(pid)
                os.waitpid(pid, 0)
                os.close(output)
        with suppress(ValueError):
            good, value = json.loads(said)
            if not stopped and isinstance(value, self.accepts if good is True else str):
                return [good is True, value]
        return [None, f"no result within {seconds:g} s or in the memory allowed"]

    def _confined(self, work: Callable[[], Any], seconds: float) -> None:
        self.jail.lock({"seconds": int(seconds) + 1, "memory": MEMORY + _size()})
        os.write(3, CONFINED)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # it ends there: also in one multiplication
        self.prepared()
        try:
            result = [True, work()]
        except BaseException as error:  # also sys.exit
            result = [False, f"{type(error).__name__}: {error}"[:8000]]
        told = json.dumps(result).encode()
        while told:
            told = told[os.write(3, told) :]

    def prepared(self) -> None:
        """What else is given up before the work begins."""


class Work(Split):
    """What `__main__.py` is asked to do here. library: math (math-verify) or gym
    (reasoning-gym).
    """

    accepts = bool | float

    def __init__(self, jail: Jail, library: str) -> None:
        super().__init__(jail)
        prepare: dict[str, Callable[..., Callable[[], Any]]] = {"math": math, "gym": gym}
        self.prepare = prepare[library]
        warm(library)
        gc.freeze()

    def __call__(self, line: str) -> list[Any]:
        # of our own making: opdkit sends a row's data and a text
        arguments, seconds = pickle.loads(bytes.fromhex(line))
        try:
            work = self.prepare(*arguments)
        except Exception as error:
            return [False, f"{type(error).__name__}: {error}"]
        return self.score(work, seconds)

    def prepared(self) -> None:
        only_arithmetic()
