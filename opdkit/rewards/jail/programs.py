"""Runs cases one by one: each program in a confined process of its own, its tests in another.

This process reads the cases. Programs are not its children but those of a second process, split off
before the first case was read: a program that searches its own memory finds neither tests nor
expected values, of this case or an earlier one.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import time
from contextlib import suppress
from typing import Any

from cell import WALL, Jail, begun, child, kill, read
from check import more_seconds, run_tests
from mounts import remove
from program import run_program
from remote import Channel, Gone

LARGEST = 64 << 20  # characters of a program, and of one input to it
OUTPUT = 1 << 20  # bytes that a program may print beside twice what is wanted
WARM = """
abc array ast bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum
fractions functools hashlib heapq inspect io itertools json math numbers operator queue random re
statistics string struct textwrap threading traceback typing unicodedata
"""


class ProgramParent:
    """The parent of programs: it has read no case, and no program either, since each reads
    its own.
    """

    def __init__(self, jail: Jail) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not os.fork():
            try:
                self.socket.close()
                _serve(theirs, jail)
            finally:
                os._exit(0)
        theirs.close()

    def start(self, *, prints: bool = False) -> tuple[Channel, int]:
        """A new program's channel, and the pipe that it prints to (-1: none)."""
        ours, theirs = socket.socketpair()
        output, write = os.pipe() if prints else (-1, -1)
        socket.send_fds(
            self.socket, [b"start"], [theirs.fileno(), write] if prints else [theirs.fileno()]
        )
        theirs.close()
        if prints:
            os.close(write)
        return Channel(ours.detach()), output

    def end(self) -> int:
        """Kill the program, if it still runs.

        Its exit status; negative: the signal that ended it.
        """
        self.socket.send(b"end")
        return int(self.socket.recv(16))


def _serve(orders: socket.socket, jail: Jail) -> None:
    for fd in (0, 1):
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    os.closerange(3, orders.fileno())
    os.closerange(orders.fileno() + 1, 256)
    pid = 0
    while True:
        order, fds, _, _ = socket.recv_fds(orders, 16, 2)
        if order == b"start":
            prints = len(fds) == 2
            pid = child(lambda: run_program(jail.lock, prints=prints), fds)  # noqa: B023
            for fd in fds:
                os.close(fd)
        elif order == b"end":
            kill(pid)
            orders.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
            pid = 0
        else:  # whoever reads the cases has ended
            if pid:
                kill(pid)
                os.waitpid(pid, 0)
            remove(jail.base)
            return


# -------------------------------------------------------------------------------------------- cases


def judge(case: dict[str, Any], jail: Jail, parent: ProgramParent) -> dict[str, Any]:
    """How many tests pass, and what was wrong with the first that does not."""
    if max(map(len, case["sources"])) > LARGEST:
        return {"passed": 0, "why": f"the program has more than {LARGEST} characters"}
    with jail:
        if case.get("shows"):
            said, why = _output(case, parent, "", OUTPUT)
            return {"said": said.decode(errors="replace"), "why": why}
        passed, why = (_printed if "inputs" in case else _called)(case, jail, parent)
    return {"passed": passed, "why": why}


def _called(case: dict[str, Any], jail: Jail, parent: ProgramParent) -> tuple[int, str]:
    """Tests in a process of their own, which calls the program's functions."""
    if "import numpy" in "".join((*case["setup"], *case["tests"])):
        with suppress(ImportError):
            __import__("numpy")  # here once, and not for each case

    channel, _ = parent.start()
    marks_read, write = os.pipe()
    pid = child(lambda: run_tests(case, jail.lock), [channel.fd, write])
    os.close(write)
    try:
        _send(channel, case, ("wanted",))
        os.close(channel.fd)
        begun(marks_read)
        end = time.monotonic() + WALL * (case["seconds"] + more_seconds(case))
        said, stopped = read(marks_read, OUTPUT, end)
    finally:
        kill(pid)
        os.waitpid(pid, 0)
        status = parent.end()
        os.close(marks_read)
    marks, _, why = said.decode(errors="replace").partition("!")
    if len(marks) == len(case["tests"]):
        return len(marks), ""
    if not why or why.startswith("Gone"):
        why = f"the program ended before its tests did{_reason(status)}"
    return len(marks), stopped or why


def _send(channel: Channel, case: dict[str, Any], keys: tuple[str, ...], **more: Any) -> None:
    with suppress(Gone):
        channel.send(
            {**{key: case[key] for key in ("sources", "seconds", "memory", *keys)}, **more}
        )


def _printed(case: dict[str, Any], jail: Jail, parent: ProgramParent) -> tuple[int, str]:
    """What the program prints, once for each input."""
    passed, first = 0, ""
    for given, wanted in zip(case["inputs"], case["outputs"], strict=True):
        if len(given) > LARGEST:
            return passed, f"an input of the test has more than {LARGEST} characters"
        most = OUTPUT + 2 * len(wanted.encode(errors="replace"))
        said, why = _output(case, parent, given, most)
        printed = said.decode(errors="replace")
        if not why and not same(printed, wanted):
            why = f"it prints {printed[:100]!r} and not {wanted[:100]!r}"
        passed += not why
        if why:
            first = first or f"{why} for the input {given[:100]!r}"
            if not case["partial"]:
                break
    return passed, first


def _output(
    case: dict[str, Any], parent: ProgramParent, given: str, most: int
) -> tuple[bytes, str]:
    """What the program prints for an input, up to `most` bytes, and what went wrong."""
    channel, output = parent.start(prints=True)
    try:
        _send(channel, case, (), stdin=given)
        begun(channel.fd)
        end = time.monotonic() + WALL * case["seconds"]
        said, why = read(output, most, end)
        if not why:
            _, why = read(channel.fd, OUTPUT, end)  # it closes where the program ends
    finally:
        status = parent.end()
        os.close(output)
        os.close(channel.fd)
    return said, why or (f"the program failed{_reason(status)}" if status else "")


def same(said: str, wanted: str) -> bool:
    """Equal line by line, white space aside; a number that is wanted with a point may be off by one
    in a million.
    """
    ours, theirs = ([line.split() for line in text.strip().splitlines()] for text in (said, wanted))
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(x == y or _near(x, y) for x, y in zip(a, b))
        for a, b in zip(ours, theirs)
    )


def _near(said: str, wanted: str) -> bool:
    if "." not in wanted:
        return False
    try:
        a, b = float(said), float(wanted)
    except ValueError:
        return False
    return abs(a - b) <= 1e-6 * max(1.0, abs(b))


def _reason(status: int) -> str:
    signals = {-signal.SIGKILL: ", killed at a limit", -signal.SIGSEGV: ", crashed"}
    return signals.get(
        status, f" (signal {-status})" if status < 0 else f" (exit {status})" if status else ""
    )


class Work:
    """What `__main__.py` is asked to do here."""

    def __init__(self, jail: Jail) -> None:
        for name in WARM.split():
            __import__(name)
        gc.freeze()
        self.jail, self.parent = jail, ProgramParent(jail)

    def __call__(self, line: str) -> dict[str, Any]:
        return judge(json.loads(line), self.jail, self.parent)
