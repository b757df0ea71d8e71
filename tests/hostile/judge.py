"""One malformed input, tried at the command line in this process, and judged by rule."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from _thread import interrupt_main
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from opdkit.cli import main

SECONDS = 60.0  # after which a command hangs
MEMORY = 1.5  # GiB that all inputs of a door may add to the peak of the process
# what a message says a person can do: an order, a range, or the names that are known
TO_DO = re.compile(
    r"\b(set|give|use|choose|write|correct|change|lower|add|remove|delete|leave|put|name|check|mend|"
    r"save|train|free|install|pass|start|restore|take|look|return|cut|convert|rename|read|ask|keep|"
    r"draw|see|wait|export|download|raise|spell|send|say|fill|make|point|run|shorten|must|"
    r"need|needs)\b|did you mean|known:|usage:",
    re.IGNORECASE,
)
# of the system's temporary files: traces, and the folders of workers that live as long as a process
KEPT = ("opdkit-error-", "opdkit-jail-")
ROOT = Path(__file__).parents[2]
PROCESS_MEMORY = 12  # GiB of addresses, of which the libraries take some
LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1)) * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from opdkit.cli import main
sys.exit(main())
"""
WORKS, REFUSED, EITHER = "works", "is refused", "works or is refused"


@dataclass(frozen=True)
class Attack:
    """One input.

    Arguments:
        name: says what is wrong with it.
        arguments: of `opdkit`; {out} is a folder that is not there yet.
        end: how it must end: WORKS, REFUSED or EITHER.
        said: a pattern that the message must contain.
    """

    name: str
    arguments: tuple[str, ...]
    end: str = REFUSED
    said: str = ""


@dataclass
class Seen:
    """What a command did."""

    status: int | None
    out: str
    err: str
    left: list[str]  # what it left behind
    seconds: float


def run(arguments: Iterable[str], folder: Path) -> Seen:
    """`opdkit ARGUMENTS` in this process, in an empty folder that is removed afterwards."""
    folder.mkdir()
    before, temporary = Path.cwd(), tempfile.tempdir
    out, err = io.StringIO(), io.StringIO()
    watch = threading.Timer(SECONDS, interrupt_main)
    start = time.monotonic()
    os.chdir(folder)
    (traces := folder.with_name(folder.name + ".tmp")).mkdir()
    tempfile.tempdir = str(traces)
    watch.start()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status: int | None = main([a.replace("{out}", str(folder / "out")) for a in arguments])
    except SystemExit as end:  # of argparse
        status = end.code if isinstance(end.code, int) else None
    except BaseException as error:
        status = None
        err.write(f"Traceback: {type(error).__name__}: {error}")
    finally:
        watch.cancel()
        os.chdir(before)
        tempfile.tempdir = temporary
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    left += [f"tmp/{p.name}" for p in traces.iterdir() if not p.name.startswith(KEPT)]
    shutil.rmtree(folder)
    shutil.rmtree(traces)
    return Seen(status, out.getvalue(), err.getvalue(), left, time.monotonic() - start)


def run_process(arguments: Iterable[str], folder: Path) -> Seen:
    """The same as a process of its own: what its end and the memory it takes are is seen from
    outside.
    """
    folder.mkdir()
    (traces := folder.with_name(folder.name + ".tmp")).mkdir()
    filled = [a.replace("{out}", str(folder / "out")) for a in arguments]
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(PROCESS_MEMORY), *filled],
        capture_output=True,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(traces), "PYTHONPATH": str(ROOT)},
        timeout=2 * SECONDS,
    )
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    left += [f"tmp/{p.name}" for p in traces.iterdir() if not p.name.startswith("opdkit-error-")]
    shutil.rmtree(folder)
    shutil.rmtree(traces)
    out, err = (stream.decode("utf-8", "replace") for stream in (ended.stdout, ended.stderr))
    return Seen(ended.returncode, out, err, left, time.monotonic() - start)


def faults(attack: Attack, seen: Seen) -> list[str]:
    """What is wrong with how a command ended; empty where all rules hold."""
    found = []
    if "Traceback" in seen.err + seen.out:
        found.append("a traceback")
    if seen.seconds > SECONDS or seen.status == 130:
        found.append(f"it hung for {seen.seconds:.0f} s")
    if seen.status not in (0, 1, 2):
        found.append(f"exit status {seen.status}")
    if seen.status == 0:
        return [*found, "accepted"] if attack.end == REFUSED else found
    if attack.end == WORKS:
        found.append("refused")
    return [*found, *_message_faults(attack, seen)]


def _message_faults(attack: Attack, seen: Seen) -> list[str]:
    found = []
    errors = [line for line in seen.err.splitlines() if re.match(r"opdkit[\w -]*: error: ", line)]
    start = 0 if "usage:" in seen.err else seen.err.find("error: ")
    message = seen.err[start:]
    if len(errors) != 1:
        found.append(f"{len(errors)} messages")
    if "nobody foresaw" in message:
        found.append("nobody foresaw it")
    if not 40 <= len(message) <= 2500:
        found.append(f"a message of {len(message)} characters")
    if not TO_DO.search(message):
        found.append("it does not say what to do")
    if attack.said and not re.search(attack.said, message):
        found.append(f"it does not say {attack.said!r}")
    if seen.left:
        found.append(f"left behind: {', '.join(seen.left[:3])}")
    return found


@dataclass
class Figures:
    """How the inputs of a door ended."""

    door: str
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def judge(
        self,
        attacks: Iterable[Attack],
        folder: Path,
        tried: Callable[[Iterable[str], Path], Seen] = run,
    ) -> Figures:
        """Try every input; say each that ended wrong, and the figures."""
        before = _peak()
        for number, attack in enumerate(attacks):
            seen = tried(attack.arguments, folder / f"case{number}")
            self.ends["worked" if seen.status == 0 else "refused"] += 1
            if bad := faults(attack, seen):
                said = seen.err[max(seen.err.find("error: "), 0) :].strip()[:500]
                self.wrong.append(f"{attack.name}: {'; '.join(bad)}\n      {said}")
        if (grown := _peak() - before) > MEMORY:
            self.wrong.append(f"the process grew by {grown:.1f} GiB")
        print(self)
        return self

    def __str__(self) -> str:
        ends = ", ".join(f"{n} {end}" for end, n in self.ends.items())
        lines = [f"{self.door}: {sum(self.ends.values())} inputs, {ends}; {len(self.wrong)} wrong"]
        return "\n   ".join([*lines, *self.wrong])


def _peak() -> float:
    """GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
