"""The process of the tests: it calls the program and says, test by test, what passed."""

from __future__ import annotations

import builtins
import os
import random
import sys
import types
from collections.abc import Callable
from typing import Any

from lock import CONFINED
from remote import MESSAGE, Channel, Gone, Peer, RemoteValue, name_class, why
from telling import TELL, compiled, tell

ROOM, PACE = 256, 1 << 20  # bytes of memory, a byte of the tests each; bytes of them a second
MODULE = "tests"  # the module of the classes that tests define
PASSED, FAILED = b".", b"!"


def run_tests(case: dict[str, Any], confine: Callable[[dict[str, Any]], None]) -> None:
    """The program answers on file 3.

    To file 4 goes a dot per test that passed, and what was wrong with the first that did not.
    """
    size = _size(case)
    channel = Channel(3, receives=MESSAGE + 2 * size)
    confine(
        {
            "seconds": case["seconds"] + more_seconds(case),
            "memory": case["memory"] + (ROOM * size >> 20),
        }
    )
    if channel.receive() != "confined":
        return
    os.write(4, CONFINED)
    random.seed(0)
    wrong = ""
    try:
        names = _names(case, channel)
        for test in case["tests"]:
            try:
                exec(compiled(test, "tests.py"), names)
                os.write(4, PASSED)
            except BaseException as error:
                wrong = wrong or f"{why(error)} in {test[:200]!r}"
                if isinstance(error, Gone) or not case["partial"]:
                    break
    except BaseException as error:
        wrong = why(error)
    if wrong:
        os.write(4, FAILED + wrong.encode("ascii", "backslashreplace"))


def _texts(case: dict[str, Any]) -> list[str]:
    return [*case["before"], *case["setup"], *case["tests"]]


def _size(case: dict[str, Any]) -> int:
    return sum(map(len, _texts(case)))


def more_seconds(case: dict[str, Any]) -> int:
    """Of CPU, for tests that are large: Python has to read them."""
    return _size(case) // PACE


def _names(case: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """What tests see: what is given before the program, then the program's names, then their own
    preparations.
    """
    module = sys.modules[MODULE] = types.ModuleType(MODULE)
    nan = any("nan" in text.lower() for text in _texts(case))
    names, peer = vars(module), Peer(channel, classes=MODULE, nan=nan)
    for source in case["before"]:
        exec(compile(source, "before.py", "exec", dont_inherit=True), names)
    for name in case["wanted"]:
        names.pop(name, None)  # a stub of the prompt must not stand in for the program's function
    state, given = channel.receive()
    if state != "ready":
        raise ProgramError(given)
    for name, packed in given.items():
        if name in case["wanted"]:
            names[name] = value = peer.unpack(packed)
            if isinstance(value, RemoteValue) and name[0].isupper():
                name_class(value)
    for name in case["wanted"]:
        if name not in names and hasattr(builtins, name):
            names[name] = _missing(name)  # Python's own must not stand in for it either
    names[TELL] = tell
    for source in case["setup"]:
        exec(compiled(source, "setup.py"), names)
    return names


def _missing(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        raise NameError(f"the program defines no {name!r}")

    return call


class ProgramError(Exception):
    """The program failed before any test."""
