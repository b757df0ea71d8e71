"""A process of our own splits off others that give up what a model's text must not reach: the
folder, the fork, the confinement.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from lock import CONFINED, THREADS, Layers, lock, offered
from mounts import FOLDER, PROGRAM, build, remove, split_off
from probe import probe

WALL = 3  # times the CPU seconds that may pass: the machine may be busy, the program may sleep
START = 60  # seconds for processes to begin, on a machine that is very busy
USERS = 61184, 4000  # systemd's range for users made up as needed
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
FILES_READ = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/dev/zero",
    "/dev/urandom",
)

COMMANDS = os.dup(0)  # what is to be done; it hangs up where the parent of all ends


@dataclass(frozen=True)
class Jail:
    """Where programs run, and with what."""

    base: str  # a folder of ours
    layers: Layers
    readable: list[str]
    threads: int  # processes and threads that the user may have

    @property
    def folder(self) -> str:
        """The program's: empty for each case. Without mounts it writes nothing there."""
        return f"{self.base}/{PROGRAM}"

    def lock(self, limits: dict[str, Any]) -> None:
        lock(
            self.layers,
            self.base,
            PROGRAM,
            self.readable,
            limits["seconds"],
            limits["memory"] << 20,
            self.threads,
        )

    def __enter__(self) -> None:
        if not self.layers.mounts:
            os.makedirs(self.folder, 0o700, exist_ok=True)
        if self.layers.user:
            os.chown(self.folder, self.layers.user, self.layers.user)

    def __exit__(self, *_: object) -> None:
        for name in os.listdir(self.folder):
            os.unlink(f"{self.folder}/{name}")
        if not self.layers.mounts:
            os.rmdir(self.folder)

    def bounded(self) -> bool:
        """Whether a program's files cannot fill the disk."""
        size = os.statvfs(self.folder)
        return not self.layers.writes or size.f_blocks * size.f_frsize <= FOLDER


def child(work: Callable[[], object], fds: list[int]) -> int:
    """Fork.

    The new process has a session of its own and, from 3 on, the files `fds`; it does `work` and
    ends.
    """
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


def kill(pid: int) -> None:
    for send in (os.killpg, os.kill):  # where it could fork, its group too
        with suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)


def begun(fd: int) -> None:
    """Wait until the program is confined: from here on, time counts."""
    if not select.select([fd], [], [], START)[0] or os.read(fd, 1) != CONFINED:
        raise RuntimeError(f"a process could not be confined, or did not start within {START} s")


def read(fd: int, most: int, end: float) -> tuple[bytes, str]:
    """What comes on `fd` until it closes, and why it was not read to its end."""
    parts: list[bytes] = []
    size = 0
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(COMMANDS, 0)  # only whether it hangs up
    while True:
        now = time.monotonic()
        if now >= end:
            return b"".join(parts), "it took too long"
        ready = dict(poll.poll((end - now) * 1000))
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


def confined(base: str, without: list[str]) -> tuple[Jail, dict[str, bool]]:
    """The strongest confinement that works on this machine, and what it was seen to hold."""
    os.chmod(base, 0o711)
    with open(f"{base}/readable", "w"):
        pass
    os.chmod(f"{base}/readable", 0o644)
    best = offered(USERS[0] + os.getpid() % USERS[1])
    best = replace(best, **{name: type(getattr(best, name))() for name in without})
    readable = [
        os.path.dirname(os.__file__),
        f"{sys.base_prefix}/lib",
        *sys.path,
        *LIBRARIES,
        *FILES_READ,
    ]
    tasks = _tasks()
    # tried by another first: a process that is half way into a user namespace is of no use
    mounted = best.mounts and _tried(base, readable) and split_off() and build(base, readable)
    # without our mounts only where nothing works with them: they cover the folder
    for mounts, seccomp, landlock, user in product(
        {mounted: 0, False: 0},
        {best.seccomp: 0, False: 0},
        {best.landlock: 0, 0: 0},
        {best.user: 0, 0: 0},
    ):
        if mounted and not mounts:
            remove(base, keep=True)
            mounted = False
        jail = Jail(
            base,
            Layers(landlock, seccomp, user, mounts),
            readable,
            THREADS if user else THREADS + tasks,
        )
        held = {}
        with suppress(OSError):  # such as where root may not change files' owners
            held = _held(jail)
        if held.get("library"):  # it works, and Python can still read its own files
            break
    return jail, held


def _tried(base: str, readable: list[str]) -> bool:
    """Whether mounts of our own can be had."""
    if not (pid := os.fork()):
        good = False
        try:
            good = split_off() and build(base, readable)
        finally:
            os._exit(0 if good else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


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
        return {**json.loads(text), "disk": jail.bounded()} if text else {}


def _tasks() -> int:
    """Processes and threads that this user has now."""
    count = 0
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count
