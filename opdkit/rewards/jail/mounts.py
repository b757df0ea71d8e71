"""A root folder that holds nothing but what programs may read, and a small file system in memory
for what they write: mounted where only this process and those that it splits off see it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from collections.abc import Iterable
from contextlib import suppress

FOLDER = 64 << 20  # bytes of all files that a program may have
FILES = 1000
PROGRAM = "program"  # the folder in the root that a program may write

# linux/sched.h, linux/mount.h
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
DETACH = 2
MOUNT_SETATTR, AT_FDCWD, RECURSIVE = 442, -100, 0x8000
READ_ONLY_NOSUID = 1 | 2

libc = ctypes.CDLL(None, use_errno=True)


def split_off() -> bool:
    """From now on what this process mounts is its own; whether that is allowed here. Who is not
    root has a user namespace for it, in which root could not give programs another user.
    """
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(NEW_MOUNTS):
        if user == 0 or libc.unshare(NEW_USER | NEW_MOUNTS):
            return False
        try:
            for name, line in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(line)
        except OSError:
            return False
    return not libc.mount(b"none", b"/", None, REC | PRIVATE, None)


def build(base: str, readable: Iterable[str]) -> bool:
    """A root at the folder `base`, over what lies in it, with `readable` to read and a folder
    `program` to write; whether it could be made.
    """
    try:
        _mount("tmpfs", base, "tmpfs", NOSUID | NOEXEC, "size=4m,mode=755")
        # parents first: what lies in them is there then
        for path in sorted({"/dev/null", *readable}, key=len):
            _place(base, os.path.abspath(path))
        os.mkdir(f"{base}/{PROGRAM}")
        _mount(
            "tmpfs",
            f"{base}/{PROGRAM}",
            "tmpfs",
            NOSUID | NODEV | NOEXEC,
            f"size={FOLDER},nr_inodes={FILES + 1},mode=700",
        )
    except OSError:
        remove(base, keep=True)
        return False
    return True


def remove(base: str, *, keep: bool = False) -> None:
    """The root goes, and where it could be unmounted the folder that it was at.

    Never what is mounted in it: those are the machine's own folders.
    """
    while os.path.ismount(base):
        if libc.umount2(base.encode(), DETACH):
            return
    if not keep:
        shutil.rmtree(base, ignore_errors=True)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind, data)]
    if libc.mount(*arguments[:3], ctypes.c_ulong(flags), arguments[3]):
        raise OSError(ctypes.get_errno(), f"mount {target}")


def _place(root: str, path: str) -> None:
    """What lies at `path`, read-only at the same place in `root`; links on the way stay links."""
    here = ""
    parts = path.strip("/").split("/")
    for i, part in enumerate(parts):
        here = f"{here}/{part}"
        there = root + here
        if os.path.islink(here):
            target = os.path.join(os.path.dirname(here), os.readlink(here))
            if not os.path.lexists(there):
                os.symlink(os.readlink(here), there)
            return _place(root, os.path.normpath(os.path.join(target, *parts[i + 1 :])))
        if not os.path.exists(here):
            return None
        if i < len(parts) - 1:
            with suppress(FileExistsError):
                os.mkdir(there)
    if not os.path.lexists(there) or not os.path.samefile(here, there):
        _bind(here, there)
    return None


def _bind(here: str, there: str) -> None:
    if os.path.isdir(here):
        os.makedirs(there, exist_ok=True)
    elif not os.path.lexists(there):
        os.close(os.open(there, os.O_CREAT))
    _mount(here, there, None, BIND | REC, None)
    wanted = struct.pack("QQQQ", READ_ONLY_NOSUID, 0, 0, 0)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, there.encode(), RECURSIVE, wanted, len(wanted)):
        raise OSError(ctypes.get_errno(), f"{there} could not be made read-only")
