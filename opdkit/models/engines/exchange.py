"""One HTTP request and its answer, bounded in time and in bytes whatever the server does; and which
addresses and keys are taken.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from opdkit.base.errors import UserError

CONNECT = 10.0  # seconds to open a connection, at most
MOST = 16 << 20  # bytes of an answer, where a request does not say more
MOST_OF_ERROR = 1 << 16  # bytes that are read of an answer with an error status
SAID = 500  # characters of a server's message that are shown
PIECE = 1 << 14  # bytes sent at once


class Broken(ValueError):
    """An answer that is none: too large, compressed, of another form."""


@dataclass(frozen=True)
class Reply:
    """A server's answer, read to its end."""

    status: int
    headers: Mapping[str, str]  # found by their names in any case
    content: bytes
    url: str


# ------------------------------------------------------------------------------------------ in time

_of_thread = threading.local()  # .end: when the exchange under way must be over, if there is one


def _left(timeout: float | None) -> float | None:
    """Seconds that one operation may wait: a server that sends a byte now and then restarts its own
    wait with each, never the exchange's.
    """
    end = getattr(_of_thread, "end", None)
    if end is None:
        return timeout
    if (left := end - time.monotonic()) <= 0:
        raise httpcore2.ReadTimeout("the exchange took too long")
    return left if timeout is None else min(timeout, left)


class _Stream(httpcore2.NetworkStream):
    """A connection whose every wait ends with the exchange."""

    def __init__(self, inner: httpcore2.NetworkStream):
        self.inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.inner.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), PIECE):
            self.inner.write(buffer[start : start + PIECE], _left(timeout))

    def close(self) -> None:
        self.inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> _Stream:
        return _Stream(self.inner.start_tls(ssl_context, server_hostname, _left(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)


class _Backend(httpcore2.SyncBackend):
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> _Stream:
        return _Stream(
            super().connect_tcp(host, port, _left(timeout), local_address, socket_options)
        )


class _Transport(httpx2.HTTPTransport):
    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._pool._network_backend = _Backend()  # httpx2 takes none, its pool of connections does


def client(url: str, key: str | None, timeout: float, connections: int) -> httpx2.Client:
    """A client of one server. timeout: seconds for one exchange."""
    host = urlsplit(url).hostname or ""
    away = host not in ("localhost", "::1") and not host.startswith("127.")
    try:
        transport = _Transport(
            trust_env=away,
            proxy=_proxy(url, host) if away else None,  # no proxy to this machine
            limits=httpx2.Limits(
                max_connections=connections, max_keepalive_connections=connections
            ),
        )
    except (ImportError, ValueError) as error:
        raise UserError(
            f"the proxy that the environment names for {url} cannot be used ({error}): set "
            "NO_PROXY, or another proxy"
        ) from error
    return httpx2.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT)),
        transport=transport,
        trust_env=away,
    )


def _proxy(url: str, host: str) -> str | None:
    found = getproxies()
    proxy = found.get(urlsplit(url).scheme) or found.get("all")
    if not proxy or proxy_bypass(host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def exchange(
    client: httpx2.Client,
    method: str,
    url: str,
    content: bytes | None,
    key: str | None,
    most: int,
) -> Reply:
    """The answer, of at most `most` bytes, within the client's time-out. The key is in no part of
    it.

    Nothing compressed is asked for or read: 3 MB of zeros' gzip are 3 GB.
    """
    headers = {"Accept-Encoding": "identity"}
    if content is not None and content[:1] == b"{":
        headers["Content-Type"] = "application/json"
    _of_thread.end = time.monotonic() + (client.timeout.read or 0.0)
    try:
        with client.stream(method, url, content=content, headers=headers) as response:
            encoding = response.headers.get("content-encoding", "identity")
            if encoding.lower() != "identity":
                raise Broken(f"its body is encoded as {shown(encoding)}, which was not asked for")
            good = response.status_code == 200
            body = _body(response, most if good else MOST_OF_ERROR, cut=not good)
            said = httpx2.Headers([(n, _without(v, key)) for n, v in response.headers.raw])
            return Reply(response.status_code, said, _without(body, key), url)
    finally:
        _of_thread.end = None


def _body(response: httpx2.Response, most: int, *, cut: bool) -> bytes:
    """cut: a longer one is cut there; else it is refused."""
    pieces, size = [], 0
    for piece in response.iter_raw():
        pieces.append(piece)
        size += len(piece)
        if size > most:
            if cut:
                break
            raise Broken(f"its body has more than the {most} bytes that the request can need")
    return b"".join(pieces)[:most]


# --------------------------------------------------------------------------------- addresses, keys


def address(url: str, what: str) -> str:
    """http://host:8000/v1/ is http://host:8000; what cannot be shown or kept in a run is refused.

    what: whose it is, in the error.
    """
    public = re.sub(r"[^/\s]*@", "", re.split("[?#]", url)[0])
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError as error:
        raise UserError(
            f"{public!r} is not the address of {what} ({error}): give one such as "
            "http://127.0.0.1:8000"
        ) from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UserError(
            f"the address of {what}, {public!r}, has a name and password, or something after ? or "
            "#, in it: addresses are written to the run's files, reports and the screen, where no "
            "secret belongs. Leave these out, and give a key in an environment variable: "
            "api_key_env=NAME"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable():
        raise UserError(
            f"{public!r} is not the address of a server: it must start with http:// or https://, "
            "such as http://127.0.0.1:8000"
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def addresses(urls: Iterable[str], what: str) -> None:
    """Refuses settings with an address that is none, before anything is written or shown."""
    for url in urls:
        address(url, what)


def check_key(key: str, variable: str, what: str) -> str:
    """A key that can be sent in a header."""
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"the key of {what} in {variable} has white space, a line break or a letter beyond "
            "ASCII in it, which no header can carry: export it anew"
        )
    return key


def _without(text: bytes, key: str | None) -> bytes:
    """A server may show the key that it was sent; of the same length, so that nothing moves."""
    return text.replace(key.encode(), b"*" * len(key)) if key else text


def shown(value: Any, most: int = 60) -> str:
    """What a server said, for a message: on one line, printable, and not all of a long one."""
    text = value if isinstance(value, str) else repr(value)
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text[: 4 * most].split()))
    return line if len(line) <= most else line[:most] + " ..."


# ------------------------------------------------------------------------------------------ answers


def object_of(reply: Reply) -> dict[str, Any]:
    """The JSON object that an answer is."""
    value = json.loads(reply.content)  # a UnicodeDecodeError is a ValueError too
    if not isinstance(value, dict):
        raise Broken(f"a JSON object was expected, not {type(value).__name__}")
    return value


def message(reply: Reply) -> str:
    """The server's own words: OpenAI's, FastAPI's or plain."""
    try:
        value = json.loads(reply.content)
    except (ValueError, RecursionError):
        value = reply.content.decode(errors="replace")
    while isinstance(value, dict):
        value = next(
            (value[key] for key in ("error", "message", "detail", "errors") if value.get(key)),
            json.dumps(value, default=str),
        )
    return shown(value, SAID).rstrip(".") or "(no message)"
