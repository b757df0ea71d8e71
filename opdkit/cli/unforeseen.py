"""Errors that nobody foresaw: one message on the screen, the trace in a file."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from pathlib import Path

from opdkit.base.errors import shown


def tell(error: BaseException, command: str) -> int:
    """Says in one message what happened and where the trace is; returns the exit status, 1."""
    kept = _keep(error)
    trace = f"The whole trace is in {kept}" if kept else "Its trace could not be kept"
    told = f"opdkit: error: {command}: {_what(error)}. {trace}"
    print(told.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return 1


def _what(error: BaseException) -> str:
    """What happened, why it matters and what to do, in one sentence."""
    if isinstance(error, SystemExit):
        return (
            f"code that ran in it called sys.exit({shown(error.code)}), so the command ended "
            "before it was done. Take that call out of your own files, if they hold one"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"the memory did not suffice ({_text(error)}), and what was under way is lost. Choose "
            "a smaller model or smaller micro_batch_tokens, or see `opdkit train --dry-run`"
        )
    if isinstance(error, RecursionError):
        return (
            "something that it read is nested too deeply to be gone through "
            f"({_place(error)}), so it ended. Write that data, setting or template flatter"
        )
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("opdkit"):
        return (
            f"the package {error.name} is not installed, and this command needs it: "
            "pip install 'opdkit[all]'"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full ({_text(error)}), so what it was writing is not there. Free some "
            "space, then give the same command again (a run continues with --resume)"
        )
    return (
        f"it stopped at an error that nobody foresaw: {_text(error)} ({_place(error)}). Nothing is "
        "known of what it was doing then, so it ended. Look there for a file or setting of yours; "
        "if none is the cause, please report it with that trace"
    )


def _text(error: BaseException) -> str:
    try:
        said = " ".join(str(error).split())
    except Exception:  # it cannot be printed
        said = ""
    name = type(error).__name__
    return f"{name}: {said[:400]}" if said else name


def _place(error: BaseException) -> str:
    """The innermost line of opdkit that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}opdkit{os.sep}" in frame.filename]
    if not ours:
        return "outside opdkit"
    frame = ours[-1]
    return f"in opdkit/{frame.filename.rpartition(f'opdkit{os.sep}')[2]}, line {frame.lineno}"


def _keep(error: BaseException) -> Path | None:
    """The trace in a file among the system's temporary ones."""
    try:
        handle, name = tempfile.mkstemp(prefix="opdkit-error-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"opdkit {' '.join(sys.argv[1:])}\n\n")
            file.write("".join(traceback.format_exception(error)))
    except Exception:  # no space, no folder, an error that cannot be printed
        return None
    return Path(name)
