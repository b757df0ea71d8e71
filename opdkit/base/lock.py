"""One writer per folder: a lock that dies with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opdkit.base.errors import UserError

LOCK = ".lock"
# of file systems that know no locks, some clusters' among them
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_mine: set[int] = set()  # descriptors that hold a lock of this process


def _forget() -> None:
    """In a forked child: the lock is its parent's, and ends with it."""
    while _mine:
        os.close(_mine.pop())


os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone: made if need be, an error where another has it.

    At the end those of the folders that it made, and that are still empty, are removed: a start
    that fails leaves none.
    """
    made: list[Path] = []
    descriptor = _taken(folder, made)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # the folder may be gone by now
                (folder / LOCK).unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        if descriptor is not None:
            _mine.discard(descriptor)
            os.close(descriptor)


def _taken(folder: Path, made: list[Path]) -> int | None:
    """The descriptor that holds the lock, None where there are no locks; notes in `made`, innermost
    first, which folders were not there.
    """
    path = folder / LOCK
    for _ in range(100):
        made[:0] = [p for p in (folder, *folder.parents) if not p.exists() and p not in made]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another start has failed, and has taken the folder away with it
        except OSError as error:
            raise _unwritable(folder, error.strerror or str(error)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{folder} is being written by another process ({holder or 'just started'}), and "
                "two of them would mix their files: wait for its end, stop it, or choose another "
                "output folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise _unwritable(folder, error.strerror or str(error)) from None
            path.unlink(missing_ok=True)
            print(
                f"opdkit: the file system of {folder} knows no locks: nothing keeps a second "
                "process from writing into it",
                file=sys.stderr,
            )
            return None
        if _is(path, descriptor):
            _sign(descriptor)
            return descriptor
        os.close(descriptor)  # the one before has ended, and has taken its file away meanwhile
    raise _unwritable(folder, "it goes away as soon as it is made")


def _sign(descriptor: int) -> None:
    """Who holds a lock, for those who are refused."""
    _mine.add(descriptor)
    with suppress(OSError):  # a full disk: it holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _is(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _unwritable(folder: Path, why: str) -> UserError:
    return UserError(
        f"the output folder {folder} cannot be written ({why}): choose another with output=DIR"
    )
