"""A process gives up, for good, what a model's program must not have: files, network, other
processes, its user.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

FILE = 16 << 20  # bytes of one file
OPEN = 64  # files open at once
THREADS = 1000
CONFINED = b"#"  # what a process says once it is confined

# The system calls that a single-threaded or threaded Python makes; every other is refused.
# NAME:x86_64/aarch64
SYSCALLS = """
read:0/63 write:1/64 readv:19/65 writev:20/66 pread64:17/67 pwrite64:18/68 close:3/57 fstat:5/80
newfstatat:262/79 stat:4/ lstat:6/ statx:332/291 access:21/ faccessat:269/48 faccessat2:439/439
lseek:8/62 getdents:78/ getdents64:217/61 getcwd:79/17 chdir:80/49 fchdir:81/50 readlink:89/
readlinkat:267/78 ftruncate:77/46 fsync:74/82 fdatasync:75/83 dup:32/23 dup2:33/ dup3:292/24
pipe:22/ pipe2:293/59 mmap:9/222 munmap:11/215 mprotect:10/226 mremap:25/216 madvise:28/233
brk:12/214 rt_sigaction:13/134 rt_sigprocmask:14/135 rt_sigreturn:15/139 rt_sigpending:127/136
rt_sigtimedwait:128/137 sigaltstack:131/132 restart_syscall:219/128 poll:7/ ppoll:271/73 select:23/
pselect6:270/72 epoll_create:213/ epoll_create1:291/20 epoll_ctl:233/21 epoll_wait:232/
epoll_pwait:281/22 eventfd2:290/19 nanosleep:35/101 clock_nanosleep:230/115 clock_gettime:228/113
clock_getres:229/114 gettimeofday:96/169 time:201/ times:100/153 getrusage:98/165 alarm:37/
setitimer:38/103 getitimer:36/102 pause:34/ getpid:39/172 getppid:110/173 gettid:186/178
getuid:102/174 geteuid:107/175 getgid:104/176 getegid:108/177 getgroups:115/158 getpgrp:111/
getpgid:121/155 getsid:124/156 getresuid:118/148 getresgid:120/150 uname:63/160 sysinfo:99/179
umask:95/166 getrlimit:97/163 setrlimit:160/164 futex:202/98 set_robust_list:273/99 rseq:334/293
sched_yield:24/124 sched_getaffinity:204/123 getcpu:309/168 membarrier:324/283 getrandom:318/278
exit:60/93 exit_group:231/94 wait4:61/260 recvfrom:45/207 shutdown:48/210 getsockopt:55/209
getsockname:51/204 getpeername:52/205 open:2/ openat:257/56 fcntl:72/25 ioctl:16/29
prlimit64:302/261 clone:56/220 socketpair:53/199 sendto:44/206 kill:62/129 tgkill:234/131 unlink:87/
unlinkat:263/35 rename:82/ renameat:264/38 renameat2:316/276 fallocate:285/47
"""
# only where Landlock says which files
IN_FOLDER = ("unlink", "unlinkat", "rename", "renameat", "renameat2", "fallocate")
# system calls from here on answer "not implemented", as older kernels do: the C library then takes
# another way
NEW = 424
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH

# linux/landlock.h
READ_FILE, READ_DIR, WRITE_FILE, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1 << 2,
    1 << 3,
    1 << 1,
    1 << 5,
    1 << 8,
    1 << 14,
)
CLONE_THREAD = 0x10000
READ_SEARCH = 2  # CAP_DAC_READ_SEARCH
ALL = 0xFFFFFFFF
OWN = 0x70696421  # stands in the filter for the id of the process that it is for

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Layers:
    """What is used of what this machine offers."""

    landlock: int  # version of the interface; 0: none
    seccomp: bool
    user: int  # the unprivileged user; 0: stay who we are
    mounts: bool  # a root and a file system of our own

    @property
    def writes(self) -> bool:
        """Whether files can be written: only where Landlock says which, and a file system of its
        own how much.
        """
        return bool(self.landlock) and self.mounts


def lock(
    layers: Layers,
    base: str,
    folder: str,
    readable: Iterable[str],
    seconds: int,
    memory: int,
    threads: int,
) -> None:
    """Confine this process: `folder` of `base` is all it may write, if anything, `readable` all
    that it may read, and where we have mounts of our own all that it sees.
    """
    parent = os.getppid()
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, these processes go first
    if layers.mounts:
        os.chroot(base)
    place = f"/{folder}" if layers.mounts else f"{base}/{folder}"
    os.chdir(place)
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    if layers.landlock:
        _landlock(layers.landlock, place, readable, writes=layers.writes)
    _privileges(layers.user, search=bool(layers.landlock))
    _prctl(4, 0)  # PR_SET_DUMPABLE: processes of the same user do not read this one's memory
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; a change of user resets it
    if os.getppid() != parent:
        os._exit(1)
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_NOFILE, OPEN),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NPROC, threads),
        (resource.RLIMIT_AS, memory),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    if layers.seccomp:
        program = bytearray(
            _program(bool(layers.landlock)).replace(
                struct.pack("I", OWN), struct.pack("I", os.getpid())
            )
        )
        buffer = (ctypes.c_char * len(program)).from_buffer(program)
        # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        _prctl(22, 2, struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)))


def offered(user: int) -> Layers:
    """What this machine seems to offer; whether it holds is for a probe to say. user: to change to,
    where we are root.
    """
    seccomp = platform.machine() in MACHINES and libc.prctl(21, 0, 0, 0, 0) >= 0  # PR_GET_SECCOMP
    if seccomp:
        _program(True), _program(False)  # made once, here: forks find them in the cache
    return Layers(
        max(0, libc.syscall(444, None, 0, 1)), seccomp, user if os.geteuid() == 0 else 0, True
    )


def _prctl(option: int, value: Any, more: Any = 0) -> None:
    if libc.prctl(option, value, more, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _privileges(user: int, *, search: bool) -> None:
    """Another user, without root's powers. search: but for reading files of any user, where
    Landlock says which.
    """
    if user:
        _prctl(8, 1)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    kept = 1 << READ_SEARCH if user and search else 0  # Python itself may lie in root's folder
    header = struct.pack("Ii", 0x20080522, 0)
    # fails where root does not have that power
    if libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0)):
        libc.capset(header, bytes(24))


# ----------------------------------------------------------------------------------------- Landlock


def _landlock(version: int, folder: str, readable: Iterable[str], *, writes: bool) -> None:
    """Files below `folder` may be made, written and removed if it `writes`, not folders or links;
    those below `readable` be read.
    """
    handled = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        handled |= (1 << bit) if version >= since else 0
    net, scoped = 3 if version >= 4 else 0, 3 if version >= 6 else 0
    attributes = struct.pack("QQQ", handled, net, scoped)[
        : 24 if version >= 6 else 16 if version >= 4 else 8
    ]
    ruleset = libc.syscall(444, attributes, len(attributes), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    own = READ_FILE | READ_DIR
    if writes:
        own |= WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
    rules = [
        (folder, own),
        ("/dev/null", READ_FILE | WRITE_FILE),
        *((path, READ_FILE | READ_DIR) for path in readable),
    ]
    for path, rights in rules:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not there, or not ours to see
            continue
        rights &= handled if os.path.isdir(path) else handled & ~READ_DIR
        if libc.syscall(445, ruleset, 1, struct.pack("=Qi", rights, beneath), 0):
            raise OSError(ctypes.get_errno(), f"landlock_add_rule({path})")
        os.close(beneath)
    if libc.syscall(446, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)


# ------------------------------------------------------------------------------------------ seccomp

# argument, its half (0: lower 32 bits), mask, values that are allowed
Check = tuple[int, int, int, tuple[int, ...]]


def _rules(files: bool) -> dict[str, list[Check]]:
    """System calls that are allowed only with some arguments. files: whether Landlock looks after
    files.
    """
    # Landlock before version 3 does not see that a file opened for reading is emptied (O_TRUNC).
    flags = (0o1003, (0, 1, 2, 0o1001, 0o1002)) if files else (0o1103, (0,))
    rules: dict[str, list[Check]] = {
        "open": [(1, 0, *flags)],
        "openat": [(2, 0, *flags)],
        "clone": [(0, 0, CLONE_THREAD, (CLONE_THREAD,))],
        "socketpair": [(0, 0, ALL, (socket.AF_UNIX,))],  # asyncio's loop has one
        # no address: only what it is connected to, itself
        "sendto": [(4, 0, ALL, (0,)), (4, 1, ALL, (0,))],
        "kill": [(0, 0, ALL, (OWN,))],
        "tgkill": [(0, 0, ALL, (OWN,))],
        "prlimit64": [(0, 0, ALL, (0, OWN))],
        # not F_SETOWN, F_SETSIG: they signal other processes
        "fcntl": [(1, 0, ALL, (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032))],
        # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIO(N)CLEX
        "ioctl": [(1, 0, ALL, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451))],
    }
    if not files:
        rules |= {name: [(0, 0, 0, ())] for name in IN_FOLDER}  # no value is allowed
    return rules


@cache
def _program(files: bool) -> bytes:
    """The filter, in the kernel's BPF."""
    rules = _rules(files)
    column, audit = MACHINES[platform.machine()]
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000  # SECCOMP_RET_*
    load, equal, least, masked, answer = 0x20, 0x15, 0x35, 0x54, 0x06  # BPF_LD, JEQ, JGE, AND, RET
    denied = (answer, 0, 0, refuse | errno.EPERM)
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for entry in SYSCALLS.split():
        name, numbers = entry.split(":")
        number = numbers.split("/")[column]
        if not number:
            continue
        body: list[tuple[int, int, int, int]] = []
        for argument, half, mask, values in rules.get(name, []):
            body += [(load, 0, 0, 16 + 8 * argument + 4 * half), (masked, 0, 0, mask)]
            body += [(equal, len(values) - n, 0, value) for n, value in enumerate(values)]
            body += [denied]
        body += [(answer, 0, 0, allow)]
        code += [(equal, 0, len(body), int(number)), *body]
    # also x86_64's x32 calls, from 2^30 on
    code += [(least, 0, 1, NEW), (answer, 0, 0, refuse | errno.ENOSYS), denied]
    return b"".join(struct.pack("HBBI", *line) for line in code)
