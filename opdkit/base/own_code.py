"""A person's own code (methods, rewards, recipes, files of them): whatever it does ends in one
message that names the place.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from opdkit.base.errors import UserError, shown

FILE_SECONDS = 600.0  # to run a file from its first to its last line: it may load a model
CALL_SECONDS = 60.0  # to make a method, which only puts parts together


class _TooLong(BaseException):
    """Raised inside code that runs too long; no `except Exception` of it catches this."""


@contextmanager
def own_code(what: str, path: str = "", seconds: float | None = None) -> Iterator[None]:
    """Runs a person's own code.

    What it raises, also by `sys.exit`, becomes a UserError that begins with `what` ("method
    'x.py:f' cannot be used") and names the line in the file `path`. After `seconds`, in the main
    thread, it is stopped; code that is busy inside a C extension is not.
    """
    try:
        with _limited(seconds):
            yield
    except (UserError, KeyboardInterrupt):  # a signal that ends the program is both
        raise
    except _TooLong as error:
        raise UserError(
            f"{what}: it did not return within {seconds:.0f} s{_line(error, path)}, and nothing "
            "else can go on until it does. Look for a loop without end there"
        ) from error
    except SystemExit as error:
        raise UserError(
            f"{what}: it calls sys.exit({shown(error.code)}){_line(error, path)}, which would end "
            "the whole program, as if all had gone well. Return a value, or raise an error"
        ) from error
    except BaseException as error:
        raise UserError(f"{what}: {where(error, path)}. Correct it there, and try again") from error


def where(error: BaseException, path: str) -> str:
    """`line 3: NameError: name 'x' is not defined`."""
    message = error.msg if isinstance(error, SyntaxError) else error
    try:
        told = f"{type(error).__name__}: {message}"
    except Exception:  # an error of one's own that cannot be printed
        told = type(error).__name__
    line = _line_number(error, path)
    return f"{f'line {line}: ' if line else ''}{told[:600]}"


def _line(error: BaseException, path: str) -> str:
    number = _line_number(error, path)
    return f" (line {number})" if number else ""


def _line_number(error: BaseException, path: str) -> int | None:
    """The innermost line of the file that an error went through."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else None
    trace = error.__traceback__
    while trace is not None:
        if path and trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Raises `_TooLong` inside after some seconds, again and again until it is out."""
    usable = (
        seconds is not None
        and hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    )
    if not usable or seconds is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
