"""Whether this process is one of several that do the same work, as whoever started them says
(torchrun, `opdkit train --nproc`), and which of them says why they end.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress

# names a file, for the processes that `--nproc` starts: who makes it is the first that failed
CLAIM = "OPDKIT_FAILED"
GRACE = 2.0  # seconds in which the others end by themselves, once one has failed


def processes() -> int:
    """How many there are."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0) if processes() > 1 else 0


_told = False  # whether this process is the one that says why all of them end


def speaks() -> bool:
    """Whether this process, which has failed, says why: of several the first that did, or the one
    of rank 0 where they cannot tell.
    """
    if processes() == 1 or _told:
        return True
    claimed = claims()
    return rank() == 0 if claimed is None else claimed


def claims() -> bool | None:
    """Whether this process is the first to ask; None where the processes have no file to tell
    by.
    """
    path = os.environ.get(CLAIM)
    if not path:
        return None
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError:  # it is there
        return False
    return True


def tell() -> None:
    """From now on this process speaks."""
    global _told
    _told = True


def end_at_once(status: int) -> None:
    """Ends this process without taking it down piece by piece, which takes the interpreter seconds
    with large libraries loaded; what is registered for the end is done.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or its reader gone
            stream.flush()
    os._exit(status)


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else usual
