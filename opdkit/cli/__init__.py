"""The command line: a table of commands, each with its arguments in a file of its own."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from typing import NoReturn

from opdkit.base.errors import UserError
from opdkit.base.interrupt import EndedElsewhere, stoppable
from opdkit.base.launched import end_at_once, processes, speaks
from opdkit.cli.answers import EVAL, SAMPLE
from opdkit.cli.cache_teacher import CACHE_TEACHER
from opdkit.cli.command import interrupted
from opdkit.cli.compare import COMPARE
from opdkit.cli.doctor import DOCTOR
from opdkit.cli.export import EXPORT
from opdkit.cli.methods import CHECK, EXPLAIN, METHODS
from opdkit.cli.neighbours import NEIGHBOURS
from opdkit.cli.quickstart import QUICKSTART
from opdkit.cli.report import REPORT
from opdkit.cli.serve_teacher import SERVE_TEACHER
from opdkit.cli.slurm import SLURM
from opdkit.cli.train import TRAIN
from opdkit.cli.unforeseen import tell

COMMANDS = (
    QUICKSTART,
    TRAIN,
    SLURM,
    CACHE_TEACHER,
    SERVE_TEACHER,
    EVAL,
    SAMPLE,
    COMPARE,
    REPORT,
    EXPORT,
    METHODS,
    EXPLAIN,
    CHECK,
    NEIGHBOURS,
    DOCTOR,
)


def parser() -> argparse.ArgumentParser:
    """Of every command in `COMMANDS`."""
    made = argparse.ArgumentParser(
        prog="opdkit", description="On-policy distillation of language models."
    )
    commands = made.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 for an error that the user can mend, 1 for one that nobody
    foresaw, 128 + its number for a signal (Ctrl-C: 130).
    """
    for stream in (sys.stdout, sys.stderr):  # what has no form in the terminal's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    made = parser()
    options, rest = made.parse_known_args(arguments)
    if hasattr(options, "settings") and all(
        "=" in text and not text.startswith("-") for text in rest
    ):
        options.settings += rest  # key=value after a flag
    elif rest:
        made.error(f"unrecognized arguments: {' '.join(rest)}")
    if not hasattr(options, "run"):
        made.print_help()
        return 0
    options.typed = list(sys.argv[1:] if arguments is None else arguments)
    _environment()
    try:
        with stoppable():
            status = options.run(options) or 0
            sys.stdout.flush()
            return status
    except UserError as error:
        if speaks():
            print(f"opdkit: error: {error}", file=sys.stderr)
        return 2
    except EndedElsewhere as end:
        return int(str(end.code))
    except KeyboardInterrupt as stop:
        return interrupted(stop, "continue with --resume")
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 0
        if not speaks():
            return 1
        name = next(command.name for command in COMMANDS if command.run is options.run)
        return tell(error, name)


def program() -> NoReturn:
    """The command line as a program of its own."""
    status = main()
    if status and processes() > 1:  # the others wait for this one
        end_at_once(status)
    raise SystemExit(status)


def _unread() -> bool:
    """Whether the reader of what is printed has gone, as in `opdkit methods | head`."""
    try:
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
        if gone:  # Python flushes once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return gone
    except (AttributeError, OSError, ValueError):  # no such call, or no file behind stdout
        return False


def _environment() -> None:
    """Defaults for the libraries, before they are loaded: no bars of their own, no spinning
    threads. What the user has set stays.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # spinning threads: 1.4x faster when idle, 10x slower when busy
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if processes() > 1:  # of a process that is gone, every other would warn
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
