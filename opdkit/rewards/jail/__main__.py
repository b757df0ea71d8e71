"""Runs cases one by one: each program in a confined process of its own, its tests in another. Started by `sandbox.py`.

This process reads the cases. Programs are not its children but those of a second process, split off before the first case was read:
a program that searches its own memory finds neither tests nor expected values, of this case or an earlier one.
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from check import CONFINED, run_tests
from lock import FILES, FOLDER, THREADS, Layers, lock, offered
from probe import probe
from program import run_program
from remote import Channel, Gone

OUTPUT = 1 << 20  # bytes that a program may print beside twice what is wanted
WALL = 3  # times the CPU seconds that may pass: the machine may be busy, the program may sleep
START = 60  # seconds for processes to begin, on a machine that is very busy
WATCH = 0.2  # seconds between looks at the folder of a program that takes its time
USERS = 61184, 4000  # systemd's range for users made up as needed
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
FILES_READ = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/zero", "/dev/urandom")
WARM = """abc array ast bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum fractions functools hashlib
heapq inspect io itertools json math numbers operator queue random re statistics string struct textwrap threading traceback typing
unicodedata"""


@dataclass(frozen=True)
class Jail:
    """Where programs run, and with what."""

    base: str  # a folder of ours
    layers: Layers
    readable: list[str]
    threads: int  # processes and threads that the user may have

    @property
    def folder(self) -> str:
        """The program's: made for each case, and removed after it."""
        return f"{self.base}/program"

    def lock(self, limits: dict[str, Any]) -> None:
        lock(self.layers, self.folder, self.readable, limits["seconds"], limits["memory"] << 20, self.threads)

    def __enter__(self) -> None:
        os.mkdir(self.folder, 0o700)
        if self.layers.user:
            os.chown(self.folder, self.layers.user, self.layers.user)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def full(self) -> bool:
        """Whether the program has written more than it may."""
        names, size = os.listdir(self.folder), 0
        for name in names:
            with suppress(FileNotFoundError):  # it is being removed
                size += os.lstat(f"{self.folder}/{name}").st_blocks * 512
        return len(names) > FILES or size > FOLDER


def child(work: Callable[[], object], fds: list[int]) -> int:
    """Fork. The new process has a session of its own and, from 3 on, the files `fds`; it does `work` and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        moved = [os.dup2(fd, 100 + n) for n, fd in enumerate(fds)]
        for fd in range(3):
            os.dup2(os.open("/dev/null", os.O_RDWR), fd)
        for n, fd in enumerate(moved):
            os.dup2(fd, 3 + n)
        os.closerange(3 + len(fds), 256)
        work()
    finally:
        os._exit(0)


class Nursery:
    """The parent of programs: it has read no case, and no program either, since each reads its own."""

    def __init__(self, jail: Jail) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not os.fork():
            try:
                self.socket.close()
                _nurse(theirs, jail)
            finally:
                os._exit(0)
        theirs.close()

    def start(self, *, prints: bool = False) -> tuple[Channel, int]:
        """A new program's channel, and the pipe that it prints to (-1: none)."""
        ours, theirs = socket.socketpair()
        read, write = os.pipe() if prints else (-1, -1)
        socket.send_fds(self.socket, [b"start"], [theirs.fileno(), write] if prints else [theirs.fileno()])
        theirs.close()
        if prints:
            os.close(write)
        return Channel(ours.detach()), read

    def end(self) -> int:
        """Kill the program, if it still runs. Its exit status; negative: the signal that ended it."""
        self.socket.send(b"end")
        return int(self.socket.recv(16))


def _nurse(orders: socket.socket, jail: Jail) -> None:
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
            _kill(pid)
            orders.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
            pid = 0
        else:  # whoever reads the cases has ended
            if pid:
                _kill(pid)
                os.waitpid(pid, 0)
            shutil.rmtree(jail.base, ignore_errors=True)
            return


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # where it could fork, its group too
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------- cases


def judge(case: dict[str, Any], jail: Jail, nursery: Nursery) -> dict[str, Any]:
    """How many tests pass, and what was wrong with the first that does not."""
    with jail:
        passed, why = (_printed if "inputs" in case else _called)(case, jail, nursery)
    return {"passed": passed, "why": why}


def _called(case: dict[str, Any], jail: Jail, nursery: Nursery) -> tuple[int, str]:
    """Tests in a process of their own, which calls the program's functions."""
    if "import numpy" in "".join((*case["setup"], *case["tests"])):
        with suppress(ImportError):
            __import__("numpy")  # here once, and not for each case

    channel, _ = nursery.start()
    read, write = os.pipe()
    pid = child(lambda: run_tests(case, jail.lock), [channel.fd, write])
    os.close(write)
    try:
        _send(channel, case, ("wanted",))
        os.close(channel.fd)
        _begun(read)
        said, stopped = _read(read, OUTPUT, time.monotonic() + WALL * case["seconds"], jail)
    finally:
        _kill(pid)
        os.waitpid(pid, 0)
        status = nursery.end()
        os.close(read)
    marks, _, why = said.decode(errors="replace").partition("!")
    if len(marks) == len(case["tests"]):
        return len(marks), ""
    if not why or why.startswith("Gone"):
        why = f"the program ended before its tests did{_reason(status)}"
    return len(marks), stopped or why


def _send(channel: Channel, case: dict[str, Any], keys: tuple[str, ...], **more: Any) -> None:
    with suppress(Gone):
        channel.send({**{key: case[key] for key in ("sources", "seconds", "memory", *keys)}, **more})


def _printed(case: dict[str, Any], jail: Jail, nursery: Nursery) -> tuple[int, str]:
    """What the program prints, once for each input."""
    passed, first = 0, ""
    for given, wanted in zip(case["inputs"], case["outputs"], strict=True):
        channel, output = nursery.start(prints=True)
        try:
            _send(channel, case, (), stdin=given)
            _begun(channel.fd)
            end = time.monotonic() + WALL * case["seconds"]
            said, why = _read(output, OUTPUT + 2 * len(wanted.encode(errors="replace")), end, jail)
            if not why:
                _, why = _read(channel.fd, OUTPUT, end, jail)  # it closes where the program ends
        finally:
            status = nursery.end()
            os.close(output)
            os.close(channel.fd)
        if not why and status:
            why = f"the program failed{_reason(status)}"
        if not why and not same(said.decode(errors="replace"), wanted):
            why = f"it prints {said[:100]!r} and not {wanted[:100].encode(errors='replace')!r}"
        passed += not why
        if why:
            first = first or f"{why} for the input {given[:100]!r}"
            if not case["partial"]:
                break
    return passed, first


def same(said: str, wanted: str) -> bool:
    """Equal line by line, white space aside; a number that is wanted with a point may be off by one in a million."""
    ours, theirs = ([line.split() for line in text.strip().splitlines()] for text in (said, wanted))
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(x == y or _near(x, y) for x, y in zip(a, b)) for a, b in zip(ours, theirs)
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
    return signals.get(status, f" (signal {-status})" if status < 0 else f" (exit {status})" if status else "")


def _begun(fd: int) -> None:
    """Wait until the program is confined: from here on, time counts."""
    if not select.select([fd], [], [], START)[0] or os.read(fd, 1) != CONFINED:
        raise RuntimeError(f"a process to run a program in could not be confined, or did not start within {START} s")


def _read(fd: int, most: int, end: float, jail: Jail) -> tuple[bytes, str]:
    """What comes on `fd` until it closes, and why it was not read to its end."""
    parts: list[bytes] = []
    size = 0
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(COMMANDS, 0)  # only whether it hangs up
    look = time.monotonic() + WATCH
    while True:
        now = time.monotonic()
        if now >= end:
            return b"".join(parts), "it took too long"
        if now >= look:
            if jail.full():
                return b"".join(parts), f"it wrote more than {FOLDER >> 20} MiB or {FILES} files"
            look = now + WATCH
        ready = dict(poll.poll(max(0.0, min(end, look) - now) * 1000))
        if ready.get(COMMANDS, 0) & select.POLLHUP:
            sys.exit()
        if fd in ready:
            part = os.read(fd, 1 << 16)
            if not part:
                return b"".join(parts), ""
            parts.append(part)
            size += len(part)
            if size > most:
                return b"".join(parts), f"it printed more than {most} bytes"


# ---------------------------------------------------------------------------------------------------------------- start


def confined(base: str, without: list[str]) -> tuple[Jail, dict[str, bool]]:
    """The strongest confinement that works on this machine, and what it was seen to hold."""
    os.chmod(base, 0o711)
    with open(f"{base}/readable", "w"):
        pass
    os.chmod(f"{base}/readable", 0o644)
    best = offered(USERS[0] + os.getpid() % USERS[1])
    best = replace(best, **{name: type(getattr(best, name))() for name in without})
    readable = [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", *sys.path, *LIBRARIES, *FILES_READ]
    for seccomp, landlock, user in product({best.seccomp: 0, False: 0}, {best.landlock: 0, 0: 0}, {best.user: 0, 0: 0}):
        jail = Jail(base, Layers(landlock, seccomp, user), readable, THREADS if user else THREADS + _tasks())
        held = _held(jail)
        if held.get("library"):  # it works, and Python can still read its own files
            break
    return jail, held


def _held(jail: Jail) -> dict[str, bool]:
    read, write = os.pipe()

    def attempt() -> None:
        jail.lock({"seconds": 10, "memory": 1024})
        os.write(3, json.dumps(probe(jail.base)).encode())

    with jail, open(read) as said:
        pid = child(attempt, [write])
        os.close(write)
        text = said.read()
        os.waitpid(pid, 0)
    return dict(json.loads(text)) if text else {}


def _tasks() -> int:
    """Processes and threads that this user has now."""
    count = 0
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def main() -> None:
    options = json.loads(sys.argv[1])
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here] + options["paths"]
    for name in WARM.split():
        __import__(name)
    results = os.fdopen(os.dup(1), "w")
    for fd in (0, 1):
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    base = tempfile.mkdtemp(prefix="opdkit-code-", dir=options["folder"])
    try:
        jail, held = confined(base, options["without"])
        gc.freeze()
        nursery = Nursery(jail)
        print(json.dumps({"held": held, "layers": asdict(jail.layers), "base": base}), file=results, flush=True)
        with suppress(BrokenPipeError), os.fdopen(COMMANDS, closefd=False) as commands:
            for line in commands:
                print(json.dumps(judge(json.loads(line), jail, nursery)), file=results, flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)


COMMANDS = os.dup(0)
main()
