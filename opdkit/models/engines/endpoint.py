"""A client of HTTP model servers: several servers of one model, bounded concurrency, retries of
what can succeed.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from opdkit.base.errors import UserError
from opdkit.models.engines.exchange import (
    MOST,
    SAID,
    Reply,
    address,
    check_key,
    client,
    exchange,
    message,
    object_of,
    shown,
)

T = TypeVar("T")

# statuses after which the same request can succeed
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
BACKOFF, LONGEST_BACKOFF = 0.5, 30.0  # seconds: the first pause, and the longest
LONGEST_ASKED = 300.0  # seconds: of a pause that a server asks for
REST = 30.0  # seconds for which a server that failed is left alone while others answer
# what reading an answer of another form than was asked for ends in
MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)


class Refused(UserError):
    """A server's answer that no repetition changes, such as 400 or 404."""

    def __init__(self, text: str, status: int, message: str, url: str):
        super().__init__(text)
        self.status, self.message, self.url = status, message, url


class Gone(UserError):
    """No server answers: another try, later, may succeed."""

    def __init__(self, text: str, said: str):
        super().__init__(text)
        self.said = said  # the faults alone


class _Fault(Exception):
    """A failure after which the same request may succeed."""

    def __init__(self, said: str, pause: float = 0.0):
        super().__init__(said)
        self.pause = pause  # seconds that the server asked for


class _Stopped(Exception):
    """Another request of the same `map` has failed."""


@dataclass
class _Server:
    """One URL and how it does."""

    url: str
    client: httpx2.Client
    busy: int = 0  # requests under way
    rests_until: float = 0.0
    said: str = ""  # its last fault; "": there was none, or it has answered since
    failed: bool = False  # whether it ever had one
    heard: float = 0.0  # when it last answered
    returning: bool = False  # after its rest one request tries it

    def path(self, path: str) -> str:
        """Where `/v1/...` lies: below the host, or in place of the path the URL already has."""
        custom = urlsplit(self.url).path.strip("/")
        return self.url + (path.removeprefix("/v1") if custom else path)


@dataclass
class Endpoint:
    """Servers of one model.

    Its methods may be called from many threads; `concurrency` bounds the requests under way.

    A URL may end in /v1 or not. A server that fails is left alone for a while and the others go on;
    a request fails when every server has failed it `retries` + 1 times, with pauses that grow
    between the rounds (full jitter). The key is read from the environment variable `key_variable`,
    if there is one.
    """

    urls: Sequence[str]
    concurrency: int = 16
    timeout: float = 120.0  # seconds for one request
    retries: int = 5
    key_variable: str | None = None
    what: str = "the server"  # in messages
    # null: time.sleep, cut short when another request of a `map` fails
    sleep: Callable[[float], None] | None = None
    # seconds for which a server that failed is left alone while others answer
    rest: float = REST
    clock: Callable[[], float] = time.monotonic
    rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        if not self.urls:
            raise UserError(f"{self.what} has no URL: give one, such as http://127.0.0.1:8000")
        self.key = self._key()
        self.urls = list(dict.fromkeys(address(url, self.what) for url in self.urls))
        self._servers = [
            _Server(url, client(url, self.key, self.timeout, self.concurrency)) for url in self.urls
        ]
        self.faults = 0  # so far: after one, a server may be another than before
        self._places = threading.BoundedSemaphore(self.concurrency)
        self._lock = threading.Lock()
        self._stop = threading.local()  # .event: of the `map` that a thread works for

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        if not (key := os.environ.get(self.key_variable)):
            raise UserError(
                f"{self.what} needs a key from the environment variable {self.key_variable}, which "
                "is not set: export it"
            )
        return check_key(key, self.key_variable, self.what)

    @property
    def servers(self) -> Sequence[_Server]:
        """How each does, in the order of the URLs."""
        return self._servers

    def each(self) -> list[Endpoint]:
        """One endpoint per server, to learn what each of them says."""
        return [self.among([server]) for server in self._servers]

    def among(self, servers: Sequence[_Server]) -> Endpoint:
        """One that asks these servers, by the same clients; all do well at first."""
        made = copy(self)
        made._servers = [_Server(s.url, s.client) for s in servers]
        made.urls, made.faults = [server.url for server in made._servers], 0
        return made

    def once(self) -> Endpoint:
        """One that tries nothing a second time."""
        made = self.among(self._servers)
        made.retries = 0
        return made

    # ------------------------------------------------------------------------------------- requests

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """What a server answers to a JSON body, which must be a JSON object too."""
        return self.request("POST", path, body, object_of)

    def get(self, path: str) -> dict[str, Any]:
        return self.request("GET", path, None, object_of)

    def request(
        self, method: str, path: str, body: Any, read: Callable[[Reply], T], most: int = MOST
    ) -> T:
        """What `read` makes of a server's answer to JSON or bytes, which has at most `most` bytes.

        One of `MALFORMED` from it means a broken answer, which is tried again.
        """
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            asked, servers = 0.0, self._round()
            while servers:
                try:
                    return self._once(servers, method, path, content, read, most)
                except _Fault as fault:
                    asked = max(asked, fault.pause)
            if attempt < self.retries:
                self.back_off(attempt, asked)
        tried = "once" if self.retries == 0 else f"{self.retries + 1} times"
        said = "; ".join(f"{s.url}: {s.said}" for s in self._servers)
        raise Gone(
            f"{self.what} does not answer {method} {path}, tried {tried}: {said}. Start it again, "
            "or look at its log",
            said,
        )

    def about(
        self,
        who: str,
        path: str,
        body: Any,
        read: Callable[[Reply, str], T],
        most: int = MOST,
        advise: Callable[[Refused], str] = str,
    ) -> T:
        """What `read` makes of a server's answer; whatever goes wrong is told with `who` the
        request is about and the server.

        read: gets the two in words, for errors that another try would not change. advise: what to
        say of a refusal.
        """

        def made(reply: Reply) -> T | UserError:
            try:
                return read(reply, f"{who} ({reply.url})")
            except UserError as error:
                return error

        try:
            told = self.request("POST", path, body, made, most)
        except Refused as refused:
            raise UserError(
                f"{who} ({refused.url}): {advise(refused)}. Nothing was learnt from this step; "
                "look at the server's log"
            ) from refused
        except UserError as error:
            text = f"{who}: {error}. Nothing was learnt from this step"
            raise (
                Gone(text, error.said) if isinstance(error, Gone) else UserError(text)
            ) from error
        if isinstance(told, UserError):
            raise told
        return told

    def _round(self) -> list[_Server]:
        """The servers to try: those that do well, or all where none does.

        One that failed and has rested gets a single request.
        """
        with self._lock:
            now = self.clock()
            well = [s for s in self._servers if s.rests_until <= now]
            for server in well:
                if server.said and len(self._servers) > 1:
                    server.returning, server.rests_until = True, now + self.rest
            return well or list(self._servers)

    def _once(
        self,
        servers: list[_Server],
        method: str,
        path: str,
        content: bytes | None,
        read: Callable[[Reply], T],
        most: int,
    ) -> T:
        """One request to the idlest of `servers`, which is taken off the list."""
        with self._places:
            self._check()
            with self._lock:
                server = min(servers, key=lambda s: (not s.returning, bool(s.said), s.busy))
                servers.remove(server)
                server.busy, server.returning = server.busy + 1, False
            try:
                result = self._send(server, method, path, content, read, most)
                server.said, server.rests_until, server.heard = "", 0.0, self.clock()
                return result
            except _Fault as fault:
                rest = max(self.rest, fault.pause)
                server.said, server.rests_until = str(fault), self.clock() + rest
                server.failed = True
                self.faults += 1
                raise
            finally:
                with self._lock:
                    server.busy -= 1

    def _send(
        self,
        server: _Server,
        method: str,
        path: str,
        content: bytes | None,
        read: Callable[[Reply], T],
        most: int,
    ) -> T:
        url = server.path(path)
        try:
            reply = exchange(server.client, method, url, content, self.key, most)
        except httpx2.TimeoutException as error:
            raise _Fault(f"no answer within {self.timeout:g} s ({type(error).__name__})") from error
        except httpx2.InvalidURL as error:
            raise UserError(f"{self.what}: {server.url!r} is not a URL ({error})") from error
        except (httpx2.HTTPError, OSError, ValueError) as error:
            raise _Fault(f"{type(error).__name__}: {shown(str(error), SAID)}") from error
        status = reply.status
        if status in AGAIN:
            raise _Fault(f"{status} {message(reply)}", _asked_pause(reply))
        if status != 200:
            advice = (
                ""
                if status not in (401, 403) or not self.key_variable
                else f"; its key is read from {self.key_variable}"
            )
            raise Refused(
                f"{self.what} refuses {method} {url} with {status}: {message(reply)}{advice}",
                status,
                message(reply),
                server.url,
            )
        try:
            return read(reply)
        except MALFORMED as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise _Fault(f"a broken answer ({kind}{shown(str(error), SAID)})") from error

    def _check(self) -> None:
        event = getattr(self._stop, "event", None)
        if event is not None and event.is_set():
            raise _Stopped

    def back_off(self, attempt: int, asked: float = 0.0) -> None:
        """The pause after try number `attempt` (from 0) has failed, at least what was asked for."""
        self._pause(max(asked, self.rng.uniform(0, min(LONGEST_BACKOFF, BACKOFF * 2**attempt))))

    def _pause(self, seconds: float) -> None:
        event = getattr(self._stop, "event", None)
        if self.sleep is not None:
            self.sleep(seconds)
        elif event is not None:
            event.wait(seconds)
        else:
            time.sleep(seconds)
        self._check()

    # ----------------------------------------------------------------------------------------- many

    def map(
        self, calls: Sequence[Callable[[], T]], tick: Callable[[int], None] | None = None
    ) -> list[T]:
        """The results of calls to this endpoint, in order, `concurrency` at once; the first failure
        ends all. `tick` hears the number done.
        """
        stop, done = threading.Event(), 0

        def run(call: Callable[[], T]) -> T:
            nonlocal done
            self._stop.event = stop
            self._check()
            result = call()
            with self._lock:
                done += 1
                if tick is not None:
                    tick(done)
            return result

        pool = ThreadPoolExecutor(
            min(self.concurrency, max(1, len(calls))), thread_name_prefix="endpoint"
        )
        try:
            futures = [pool.submit(run, call) for call in calls]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [e for f in futures if f.done() and (e := f.exception()) is not None]
            if failed:
                own = (e for e in failed if not isinstance(e, _Stopped))
                raise next(own, failed[0])
            return [future.result() for future in futures]
        finally:
            stop.set()  # what is under way ends with its request; nobody waits for it
            pool.shutdown(wait=False, cancel_futures=True)


def _asked_pause(reply: Reply) -> float:
    """Seconds of Retry-After, which is a number or a date; 0 without one."""
    text = reply.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_ASKED)
