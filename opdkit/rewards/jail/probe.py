"""What a confined process is in fact kept from: tried, not assumed."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable


def probe(outside: str) -> dict[str, bool]:
    """In a confined process: what holds.

    `outside` is a folder that it must not write, with a file `readable` in it.
    """
    parent = os.getppid()
    return {
        "network": _fails(lambda: socket.socket().close())
        and _fails(lambda: socket.socket(socket.AF_UNIX).close()),
        "processes": _fails(_fork),
        "writing": _fails(lambda: _write(f"{outside}/written"))
        and _fails(lambda: os.chmod(f"{outside}/readable", 0o666)),
        "reading": _fails(lambda: _read(f"{outside}/readable")),
        "seeing": _fails(lambda: os.stat(f"{outside}/readable")),
        "neighbours": _fails(lambda: os.kill(parent, 0))
        and _fails(lambda: _read(f"/proc/{parent}/environ")),
        "library": not _fails(lambda: importlib.import_module("colorsys")),
    }


def _fails(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except Exception:
        return True
    return False


def _fork() -> None:
    if not os.fork():
        os._exit(0)


def _write(path: str) -> None:
    with open(path, "w") as file:
        file.write("x")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
