"""The process of a program: it confines itself, runs what a model wrote, and answers the calls of
tests.
"""

from __future__ import annotations

import atexit
import builtins
import os
import random
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from lock import CONFINED
from remote import MESSAGE, ORDER, Channel, Peer, why

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run_program(confine: Callable[[dict[str, Any]], None], *, prints: bool) -> None:
    """Run the program that is sent on file 3. prints: it is given its input, and what it prints
    goes to file 4.
    """
    channel = Channel(3, MESSAGE, ORDER)
    order = channel.receive()
    if prints:
        _input(order.pop("stdin").encode(errors="replace"))
        os.dup2(4, 1)
        os.close(4)
    os.environ.clear()
    os.environ.update(THREADS)
    sys.argv = ["solution.py"]
    # as where Python starts with its site module
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    confine(order)
    random.seed(0)
    if prints:
        os.write(3, CONFINED)
        os._exit(_run(order["sources"]))
    channel.send("confined")
    _serve(channel, order)


def _input(data: bytes) -> None:
    """Standard input: a file in memory, which takes any size and can be read to its end."""
    fd = os.memfd_create("input")
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    os.dup2(fd, 0)
    os.close(fd)


def _module(name: str) -> dict[str, Any]:
    module = sys.modules[name] = types.ModuleType(name)
    return vars(module)


def compiled(sources: list[str]) -> types.CodeType:
    """The first of the sources that is Python."""
    for source in sources:
        try:
            return compile(source, "solution.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            wrong = error
    raise wrong


def _run(sources: list[str]) -> int:
    """As `python solution.py` does; the exit status."""
    status = 0
    try:
        exec(compiled(sources), _module("__main__"))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status & 255


def _serve(channel: Channel, order: dict[str, Any]) -> None:
    names = _module("solution")
    peer = Peer(channel)
    try:
        exec(compiled(order["sources"]), names)
        ready = {name: peer.pack(names[name]) for name in order["wanted"] if name in names}
    except BaseException as error:
        channel.send(["failed", why(error)])
        return
    channel.send(["ready", ready])
    while True:
        peer.answer(*channel.receive())
