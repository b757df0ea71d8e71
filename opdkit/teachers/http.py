"""HTTP around the models that `opdkit serve-teacher` has: requests, answers, and their bounds."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from opdkit.base.errors import UserError
from opdkit.teachers import protocol
from opdkit.teachers.front import Front
from opdkit.teachers.gate import BadRequest, Deadlines, Room, is_own, own_names
from opdkit.teachers.pool import Pool

LARGEST_BODY = 1 << 28  # bytes of a request for scores
LARGEST_JSON = 1 << 23  # bytes of a request in JSON
UNPACKED = {"/score": 3}  # bytes of memory that a byte of a request takes, once read
UNPACKED_JSON = 32
BODIES = 2 << 30  # bytes of memory that all requests may take
PIECE = 1 << 20  # bytes of it read at once
HEAD = 1 << 16  # bytes of a request's first line and headers
CONNECTIONS = 256  # open at once; each has a thread
# Seconds: for a request's first line and headers, the pause before it included; for its body and
# for sending the answer, each beside a second per RATE bytes; for all between.
ARRIVING, MOVING, WORKING = 15.0, 30.0, 900.0
RATE = 1 << 20
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
GRACE = 30.0  # seconds that a shutdown waits for what is under way
JSON, BINARY = "application/json", "application/octet-stream"


class _Lines:
    """A connection's input, whose lines have at most HEAD bytes together until it is `reset`."""

    def __init__(self, file: Any):
        self.read, self.close, self.file = file.read, file.close, file
        self.reset()

    def reset(self) -> None:
        self.left = HEAD

    def readline(self, size: int = -1) -> bytes:
        if self.left <= 0:
            raise ConnectionAbortedError("too many headers")
        line: bytes = self.file.readline(self.left if size < 0 else min(size, self.left))
        self.left -= len(line)
        return line


class Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the service, writes the answer."""

    protocol_version = "HTTP/1.1"
    # an answer's body would wait 40 ms for its headers' acknowledgement
    disable_nagle_algorithm = True
    server: TeacherServer
    asked: Front | None = None  # the model that the request under way asks for

    def setup(self) -> None:
        super().setup()
        self.rfile: Any = _Lines(self.rfile)

    def handle_one_request(self) -> None:
        self.rfile.reset()
        self.asked = self.server.only
        self.server.deadlines.set(self.connection, ARRIVING, waits=True)
        try:
            super().handle_one_request()
        finally:
            self.server.bodies.release()
            for room in self.server.rooms:
                room.release()

    def finish(self) -> None:
        self.server.deadlines.forget(self.connection)
        super().finish()

    def do_GET(self) -> None:
        routes: dict[str, Callable[[], Any]] = {
            "/health": dict,
            "/v1/models": self.server.models,
            "/tokenizer": lambda: self.teacher().vocabulary(),
            "/head": lambda: self.teacher().head(),
            "/pool": lambda: self.server.told(self.number("since")),
        }
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body that nobody reads
        self.answer(routes)

    def do_POST(self) -> None:
        try:
            self.refuse_foreign()
            body = self.body()
        except BadRequest as error:  # where the next request begins is not known
            self.close_connection = True
            return self.write(error.status, _error(str(error), error.status))
        routes: dict[str, Callable[[], Any]] = {
            "/score": lambda: self.teacher().score(body),
            "/v1/completions": lambda: self.completed(_json(body)),
        }
        return self.answer(routes)

    def teacher(self, name: Any = None) -> Front:
        """The model that a request names, as `?model=NAME` or by `name`."""
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        self.asked = self.server.named(query.get("model", [None])[-1] if name is None else name)
        return self.asked

    def completed(self, given: dict[str, Any]) -> dict[str, Any]:
        return self.teacher(given.get("model")).completions(given)

    def number(self, name: str) -> float:
        """A number of the query; 0 where it has none."""
        said = parse_qs(urlsplit(self.path).query).get(name, ["0"])[-1]
        try:
            return float(said)
        except ValueError:
            raise BadRequest(f"{name}={protocol.shown(said)} is no number") from None

    def refuse_foreign(self) -> None:
        """A browser's request for a page of another site."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not is_own(hosts[0], self.server.names):
            raise BadRequest(
                f"this server is not called {protocol.shown(', '.join(hosts))}: ask for it by its "
                "address or as localhost, or start it with --host-names",
                403,
            )
        origin = self.headers.get("Origin")
        if origin is not None and not is_own(origin.partition("://")[2], self.server.names):
            raise BadRequest(f"no page of {protocol.shown(origin)} may ask this server", 403)

    def body(self) -> bytes:
        """What the headers announce, piece by piece: memory is taken for bytes that have come."""
        said = self.headers.get("Content-Length", "")
        if said and not (said.isascii() and said.isdecimal()):
            raise BadRequest(f"Content-Length: {protocol.shown(said)} is no number of bytes")
        if "Transfer-Encoding" in self.headers:
            raise BadRequest("a request needs a Content-Length, and no Transfer-Encoding", 411)
        unpacked = UNPACKED.get(self.path.partition("?")[0], UNPACKED_JSON)
        most = LARGEST_JSON if unpacked == UNPACKED_JSON else LARGEST_BODY
        if not 0 < len(said) <= 12 or int(said) > most:
            raise BadRequest(f"a request needs a Content-Length of at most {most} bytes", 413)
        self.server.deadlines.set(self.connection, WORKING)
        self.server.bodies.take(unpacked * int(said))
        self.server.deadlines.set(self.connection, MOVING + int(said) / RATE)
        came = bytearray()
        while len(came) < int(said):
            if not (piece := self.rfile.read(min(PIECE, int(said) - len(came)))):
                raise BadRequest(
                    f"the body ends after {len(came)} of the {said} bytes that Content-Length "
                    "announces"
                )
            came += piece
        return bytes(came)

    def answer(self, routes: Mapping[str, Callable[[], Any]]) -> None:
        path = self.path.partition("?")[0]
        self.server.deadlines.set(self.connection, WORKING)
        with self.server.working():
            try:
                self.refuse_foreign()
                if path not in routes:
                    raise BadRequest(f"there is no {self.command} {path} here", 404)
                self.write(200, routes[path]())
            except BadRequest as error:
                self.write(error.status, _error(str(error), error.status))
            except UserError as error:  # of the model: it would say the same again
                self.write(422, _error(str(error), 422))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            except Exception as error:
                print(
                    f"opdkit: {self.command} {path} failed: {type(error).__name__}: {error}",
                    file=sys.stderr,
                )
                self.write(500, _error(f"{type(error).__name__}: {error}", 500))

    def write(self, status: int, value: Any) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.server.deadlines.set(self.connection, MOVING + len(body) / RATE)
        self.send_response(status)
        self.send_header("Content-Type", BINARY if isinstance(value, bytes) else JSON)
        self.send_header("Content-Length", str(len(body)))
        if self.asked is not None:
            self.send_header(protocol.FINGERPRINT, self.asked.fingerprint)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged one by one."""


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def _error(message: str, status: int) -> dict[str, Any]:
    return {"error": {"message": message, "code": status}}


class TeacherServer(ThreadingHTTPServer):
    """Counts what is under way, so that a shutdown can wait for it; and bounds it."""

    daemon_threads = True
    request_queue_size = 256  # a step's rollouts come all at once

    def __init__(
        self,
        address: tuple[str, int],
        services: Sequence[Front],
        names: Iterable[str] = (),
        pool: Pool | None = None,
    ):
        super().__init__(address, Handler)
        self.services, self.pool = {one.about.name: one for one in services}, pool
        self.only = services[0] if len(services) == 1 else None
        self.rooms = {id(one.room): one.room for one in services}.values()
        self.busy, self.idle = 0, threading.Condition()
        self.names = own_names(address[0], names)
        self.deadlines, self.bodies = Deadlines(), Room(BODIES)
        self.places = threading.BoundedSemaphore(CONNECTIONS)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [one.about.card() for one in self.services.values()]}

    def named(self, name: Any) -> Front:
        """The model of a name; the only one where none is given."""
        names = ", ".join(self.services)
        if name is None and self.only is not None:
            return self.only
        if name is None:
            raise BadRequest(f"this server has {names}: say which is asked, as ?model=NAME")
        if name not in self.services:
            raise BadRequest(f"The model `{name}` does not exist: this server has {names}", 404)
        return self.services[name]

    def told(self, since: float) -> dict[str, Any]:
        """What the workers of several models did; nothing of one model alone."""
        if self.pool is None:
            return {"counts": {}, "spans": []}
        return {"counts": self.pool.counts(), "spans": self.pool.spans(since)}

    def service_actions(self) -> None:
        """Called by serve_forever, several times a second."""
        self.deadlines.enforce()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, if there are not too many; one that only waits makes way."""
        free = self.places.acquire(blocking=False)
        if not free and self.deadlines.evict():
            free = self.places.acquire(timeout=1.0)
        if not free:
            request.settimeout(1.0)
            with suppress(OSError):
                request.sendall(BUSY)
            return self.shutdown_request(request)
        try:
            return super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started
            self.places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def working(self) -> _Working:
        return _Working(self)

    def drain(self, seconds: float = GRACE) -> None:
        """Waits until every answer is written."""
        with self.idle:
            self.idle.wait_for(lambda: self.busy == 0, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""


@dataclass
class _Working:
    server: TeacherServer

    def __enter__(self) -> None:
        with self.server.idle:
            self.server.busy += 1

    def __exit__(self, *_: object) -> None:
        with self.server.idle:
            self.server.busy -= 1
            self.server.idle.notify_all()
