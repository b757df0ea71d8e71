"""Commands in child processes that may be killed or meet each other, and how what they say and
leave is judged.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from opdkit.base.files import PARTIAL, REPLACED
from opdkit.base.lock import LOCK
from opdkit.cli import main
from opdkit.run.folder import FORMER, MOVING

# marks of work in progress: none of them stays
PASSING = (PARTIAL, REPLACED, FORMER, MOVING, LOCK)
PRELOADED = ("opdkit.run.launch", "opdkit.study.compare", "opdkit.run.cache_teacher")


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    text: str  # on stderr

    @property
    def messages(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("opdkit: error: ")]

    @property
    def crashed(self) -> bool:
        return "Traceback" in self.text


def refusal_faults(said: Said, *words: str) -> list[str]:
    """What is wrong with a refusal: it ends with 2, one message and no traceback, and names what
    it is about.
    """
    faults = []
    if said.code != 2:
        faults.append(f"ended with {said.code}")
    if said.crashed:
        faults.append("traceback")
    if len(said.messages) != 1:
        faults.append(f"{len(said.messages)} messages")
    faults += [f"says nothing of {word!r}" for word in words if word not in said.text]
    return faults


def passing(folder: Path) -> list[str]:
    """What work in progress has left anywhere in a folder."""
    return [str(p) for p in folder.rglob("*") if p.name.startswith(PASSING)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


class Child:
    """`opdkit ARGUMENTS` in a process of its own, forked from one that has imported everything."""

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *PRELOADED])
        self.log = log
        given = (list(arguments), str(log), environment or {})
        self.process: BaseProcess = context.Process(target=_run, args=given)
        self.process.start()

    def wait(self) -> Said:
        self.process.join()
        assert self.process.exitcode is not None
        return Said(self.process.exitcode, self.log.read_text() if self.log.exists() else "")

    def kill(self, after: float) -> bool:
        """SIGKILL after so many seconds; whether it was still going."""
        self.process.join(after)
        going = self.process.is_alive()
        self.process.kill()
        self.process.join()
        return going


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def report(what: str, faults: dict[str, list[str]], count: int) -> None:
    """Prints the figures, and fails where one is wrong."""
    for name, said in faults.items():
        print(f"  {name}: {'; '.join(said)}")
    print(f"\nhostile: {what}: {count - len(faults)} of {count} right, {len(faults)} wrong")
    assert not faults, faults
