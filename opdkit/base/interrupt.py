"""SIGTERM and SIGHUP end a run as Ctrl-C does: from a scheduler or a closed terminal, what has been
learnt is kept.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Windows has no SIGHUP
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(SystemExit, KeyboardInterrupt):
    """A signal that ends the program.

    What catches Ctrl-C catches it. Where nothing does, Python ends with the status that shells give
    to that signal, 128 + its number, and without a traceback, once every `finally` has run.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


class EndedElsewhere(SystemExit):
    """Another process of the same work has ended it and said why: this one ends in silence."""


def status(stopped: KeyboardInterrupt) -> int:
    """The exit status of a program that was stopped: 130 for Ctrl-C, 143 for SIGTERM, 129 for
    SIGHUP.
    """
    return 128 + (stopped.number if isinstance(stopped, Stopped) else signal.SIGINT)


class _Guard:
    """The handler of both signals.

    Python calls it in the main thread, between two steps of the program.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.holding = 0
        self.late: int | None = None  # a signal that came while holding

    def __call__(self, number: int, frame: object) -> None:
        if os.getpid() != self.owner:  # a forked child, which has nothing to keep
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.holding and not (number == self.late == signal.SIGINT):
            self.late = number
        else:
            raise stop(number)


_guard: _Guard | None = None


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `Stopped`; behind it they do what they did before.

    Only what nobody has decided on is changed, and only in the main thread, the one that may: an
    ignored signal stays ignored (SIGHUP under `nohup`), and a handler of the program around this
    stays in charge. It stops a run by raising KeyboardInterrupt.
    """
    global _guard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, guard = _guard, _Guard()
    mine = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    if mine:
        _guard = guard
    for number in mine:
        signal.signal(number, guard)
    try:
        yield
    finally:
        for number in mine:
            if signal.getsignal(number) is guard:
                signal.signal(number, signal.SIG_DFL)
        _guard = before


def waiting() -> int:
    """The number of a signal that waits for the end of what is `held`; 0: there is none."""
    return 0 if _guard is None or _guard.late is None else _guard.late


def stop(number: int) -> KeyboardInterrupt:
    """What a signal raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


@contextmanager
def held() -> Iterator[None]:
    """What has to be done whole: a SIGTERM or SIGHUP that comes meanwhile, such as a scheduler's
    second one, waits for its end. So does a Ctrl-C, but not the second.
    """
    if (guard := _guard) is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    guard.holding += 1
    ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ctrl_c:
        signal.signal(signal.SIGINT, guard)
    try:
        yield
    finally:
        guard.holding -= 1
        if ctrl_c:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not guard.holding and guard.late is not None:
            number, guard.late = guard.late, None
            raise stop(number)
