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
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from opdkit.base.errors import UserError

T = TypeVar("T")

# statuses after which the same request can succeed
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
BACKOFF, LONGEST_BACKOFF = 0.5, 30.0  # seconds: the first pause, and the longest
LONGEST_ASKED = 300.0  # seconds: of a pause that a server asks for
REST = 30.0  # seconds for which a server that failed is left alone while others answer
CONNECT = 10.0  # seconds to open a connection, at most
SAID = 500  # characters of a server's message that are shown


class Refused(UserError):
    """A server's answer that no repetition changes, such as 400 or 404."""

    def __init__(self, text: str, status: int, message: str, url: str):
        super().__init__(text)
        self.status, self.message, self.url = status, message, url


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
    said: str = ""  # its last fault
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
    clock: Callable[[], float] = time.monotonic
    rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        if not self.urls:
            raise UserError(f"{self.what} has no URL: give one, such as http://127.0.0.1:8000")
        headers = {"Authorization": f"Bearer {key}"} if (key := self._key()) else {}
        self._servers = [_Server(url, self._client(url, headers)) for url in map(_base, self.urls)]
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
        return key

    def _client(self, url: str, headers: dict[str, str]) -> httpx2.Client:
        host = urlsplit(url).hostname or ""
        return httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, CONNECT)),
            limits=httpx2.Limits(
                max_connections=self.concurrency, max_keepalive_connections=self.concurrency
            ),
            # no proxy to this machine
            trust_env=host not in ("localhost", "::1") and not host.startswith("127."),
        )

    def each(self) -> list[Endpoint]:
        """One endpoint per server, to learn what each of them says."""
        return [replace(self, urls=[server.url]) for server in self._servers]

    # ------------------------------------------------------------------------------------- requests

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """What a server answers to a JSON body, which must be a JSON object too."""
        return self.request("POST", path, body, _object)

    def get(self, path: str) -> dict[str, Any]:
        return self.request("GET", path, None, _object)

    def request(self, method: str, path: str, body: Any, read: Callable[[httpx2.Response], T]) -> T:
        """What `read` makes of a server's answer to JSON or bytes; a ValueError from it means a
        broken answer, which is tried again.
        """
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            asked, servers = 0.0, self._round()
            while servers:
                try:
                    return self._once(servers, method, path, content, read)
                except _Fault as fault:
                    asked = max(asked, fault.pause)
            if attempt < self.retries:
                self._pause(
                    max(asked, self.rng.uniform(0, min(LONGEST_BACKOFF, BACKOFF * 2**attempt)))
                )
        tried = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise UserError(
            f"{self.what} does not answer {method} {path}, tried {tried}: "
            f"{'; '.join(f'{s.url}: {s.said}' for s in self._servers)}. Start it again, or look at "
            "its log"
        )

    def _round(self) -> list[_Server]:
        """The servers to try: those that do well, or all where none does.

        One that failed and has rested gets a single request.
        """
        with self._lock:
            now = self.clock()
            well = [s for s in self._servers if s.rests_until <= now]
            for server in well:
                if server.said and len(self._servers) > 1:
                    server.returning, server.rests_until = True, now + REST
            return well or list(self._servers)

    def _once(
        self,
        servers: list[_Server],
        method: str,
        path: str,
        content: bytes | None,
        read: Callable[[httpx2.Response], T],
    ) -> T:
        """One request to the idlest of `servers`, which is taken off the list."""
        with self._places:
            self._check()
            with self._lock:
                server = min(servers, key=lambda s: (not s.returning, bool(s.said), s.busy))
                servers.remove(server)
                server.busy, server.returning = server.busy + 1, False
            try:
                result = self._send(server, method, path, content, read)
                server.said, server.rests_until = "", 0.0
                return result
            except _Fault as fault:
                server.said, server.rests_until = str(fault), self.clock() + max(REST, fault.pause)
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
        read: Callable[[httpx2.Response], T],
    ) -> T:
        url = server.path(path)
        headers = (
            {"Content-Type": "application/json"}
            if content is not None and content[:1] == b"{"
            else {}
        )
        try:
            response = server.client.request(method, url, content=content, headers=headers)
        except httpx2.TimeoutException as error:
            raise _Fault(f"no answer within {self.timeout:g} s ({type(error).__name__})") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Fault(f"{type(error).__name__}: {error}") from error
        except httpx2.InvalidURL as error:
            raise UserError(f"{self.what}: {server.url!r} is not a URL ({error})") from error
        status = response.status_code
        if status in AGAIN:
            raise _Fault(f"{status} {_message(response)}", _asked_pause(response))
        if status != 200:
            advice = (
                ""
                if status not in (401, 403) or not self.key_variable
                else f"; its key is read from {self.key_variable}"
            )
            raise Refused(
                f"{self.what} refuses {method} {url} with {status}: {_message(response)}{advice}",
                status,
                _message(response),
                server.url,
            )
        try:
            return read(response)
        except ValueError as error:
            raise _Fault(f"a broken answer ({error})") from error

    def _check(self) -> None:
        event = getattr(self._stop, "event", None)
        if event is not None and event.is_set():
            raise _Stopped

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


# ------------------------------------------------------------------------------------------ answers


def _base(url: str) -> str:
    """http://host:8000/v1/ is http://host:8000."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"{url!r} is not the address of a server: it must start with http:// or https://, such "
            "as http://127.0.0.1:8000"
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _object(response: httpx2.Response) -> dict[str, Any]:
    value = json.loads(response.content)  # a UnicodeDecodeError is a ValueError too
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not {type(value).__name__}")
    return value


def _message(response: httpx2.Response) -> str:
    """The server's own words: OpenAI's, FastAPI's or plain."""
    try:
        value = json.loads(response.content)
    except ValueError:
        value = response.text
    while isinstance(value, dict):
        value = next(
            (value[key] for key in ("error", "message", "detail", "errors") if value.get(key)),
            json.dumps(value, default=str),
        )
    return " ".join(str(value).split())[:SAID].rstrip(".") or "(no message)"


def _asked_pause(response: httpx2.Response) -> float:
    """Seconds of Retry-After, which is a number or a date; 0 without one."""
    text = response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_ASKED)
