"""What keeps a server alive whatever is sent to it: memory that requests share, deadlines of
connections, and the names that it is called by.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

WAIT = 60.0  # seconds that a request waits for memory that others hold


class BadRequest(Exception):
    """A request that is answered with an error; but for a status from 500 on no repetition makes it
    right.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Room:
    """Bytes that all requests under way may take together; each is one thread's."""

    def __init__(self, total: int):
        self.total, self.taken = total, 0
        self.freed, self.own = threading.Condition(), threading.local()

    def take(self, size: int) -> None:
        """Waits until there is room, which this thread has until it releases it. More than all
        there is means all.
        """
        size = min(size, self.total)
        with self.freed:
            if not self.freed.wait_for(lambda: self.taken + size <= self.total, WAIT):
                raise BadRequest("other requests take all memory there is for them: come back", 503)
            self.taken += size
            self.own.size = getattr(self.own, "size", 0) + size

    def release(self) -> None:
        """What this thread has taken is free again."""
        with self.freed:
            self.taken -= getattr(self.own, "size", 0)
            self.own.size = 0
            self.freed.notify_all()


class Deadlines:
    """Connections, and when each must be through with what it does now.

    One that is late is shut down, which ends the wait of the thread that serves it.
    """

    def __init__(self) -> None:
        self.ends: dict[socket.socket, tuple[bool, float]] = {}
        self.lock = threading.Lock()

    def set(self, connection: socket.socket, seconds: float, *, waits: bool = False) -> None:
        """waits: for a request, so that nothing is lost where it ends."""
        with self.lock:
            self.ends[connection] = waits, time.monotonic() + seconds

    def forget(self, connection: socket.socket) -> None:
        with self.lock:
            self.ends.pop(connection, None)

    def enforce(self) -> None:
        """Shut down those that are late."""
        now = time.monotonic()
        with self.lock:
            for connection in [c for c, (_, end) in self.ends.items() if end <= now]:
                self._shut(connection)

    def evict(self) -> bool:
        """Shut down the one that has waited longest for a request, if one waits."""
        with self.lock:
            waiting = [
                (end, i, c) for i, (c, (waits, end)) in enumerate(self.ends.items()) if waits
            ]
            if waiting:
                self._shut(min(waiting)[2])
            return bool(waiting)

    def _shut(self, connection: socket.socket) -> None:
        del self.ends[connection]
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def is_own(host: str | None, names: Iterable[str]) -> bool:
    """Whether a Host header means this server: an address, localhost, or one of `names`.

    A page of another site may have its name resolve to 127.0.0.1, and a browser then hands that
    page what this server answers; but it sends the site's name along.
    """
    with suppress(ValueError):
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".").lower()
        if name in ("localhost", *names) or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
        return True
    return False


def own_names(host: str, more: Iterable[Any] = ()) -> frozenset[str]:
    """Names, beside addresses, by which a server bound to `host` is called."""
    return frozenset(str(name).lower() for name in (host, socket.gethostname(), *more))
