"""`opdkit serve-teacher` under attack: it goes on answering those who ask as they should."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from opdkit.teachers import gate, http
from opdkit.teachers.gate import BadRequest, Room, is_own, own_names
from opdkit.teachers.http import TeacherServer
from tests.common.tiny import tiny_model
from tests.teachers.test_serve import serving, url


@pytest.fixture
def one() -> Iterator[TeacherServer]:
    with serving(tiny_model("llama")) as (server,):
        yield server


def half_sent(
    server: TeacherServer, data: bytes = b"POST /score HTTP/1.1\r\nHost"
) -> socket.socket:
    raw = socket.create_connection(server.server_address[:2], timeout=20)
    raw.sendall(data)
    return raw


def ends(raw: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    try:
        return b"".join(iter(lambda: raw.recv(1 << 16), b""))
    except ConnectionResetError:
        return b""


def threads() -> int:
    return sum("process_request_thread" in t.name for t in threading.enumerate())


def test_half_sent_requests_make_way_and_hold_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTIONS", 8)
    with serving(tiny_model("llama")) as (server,), ExitStack() as stack:
        before = threads()
        for _ in range(20):
            stack.enter_context(half_sent(server))
        assert httpx2.get(url(server) + "/v1/models").status_code == 200
        assert threads() - before <= 9


BODY = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize(
    "data", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: a\r\n", BODY, BODY + b"x" * 10]
)
def test_no_request_outlives_its_deadline(
    data: bytes, one: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that sends a byte now and then."""
    monkeypatch.setattr(http, "ARRIVING", 0.2)
    monkeypatch.setattr(http, "MOVING", 0.2)
    with half_sent(one, data) as raw:
        end = time.monotonic() + 10
        with pytest.raises(OSError):
            while time.monotonic() < end:
                raw.sendall(b"a")
                time.sleep(0.02)
        assert time.monotonic() < end


def test_headers_have_an_end(one: TeacherServer) -> None:
    with half_sent(one, b"GET / HTTP/1.1\r\n") as raw, pytest.raises(OSError):
        for _ in range(10_000):
            raw.sendall(b"A: " + b"b" * 1000 + b"\r\n")


def asked(server: TeacherServer, *headers: str, method: str = "GET") -> int:
    """The status of an answer."""
    lines = [f"{method} /v1/models HTTP/1.1", *headers, "Connection: close", "", ""]
    with half_sent(server, "\r\n".join(lines).encode()) as raw:
        return int(ends(raw).split()[1])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Host: localhost:8000"], 200),
        (["Host: 127.0.0.1"], 200),
        (["Host: [::1]:8000"], 200),
        (["Host: 10.1.2.3:80"], 200),
        (["Host: evil.example"], 403),
        (["Host: localhost.evil.example"], 403),
        (["Host: 127.0.0.1.evil.example"], 403),
        (["Host: evil.example@127.0.0.1"], 200),  # the host of that is the address
        (["Host: 127.0.0.1@evil.example"], 403),
        (["Host: "], 403),
        (["Host: [::1"], 403),
        ([], 403),
        (["Host: localhost", "Host: evil.example"], 403),
        (["Host: localhost", "Origin: http://evil.example"], 403),
        (["Host: localhost", "Origin: null"], 403),
        (["Host: localhost", "Origin: http://localhost:3000"], 200),
    ],
)
def test_it_answers_to_its_own_names(headers: list[str], status: int, one: TeacherServer) -> None:
    """A site's name that resolves to this machine would let its pages read the answers."""
    assert asked(one, *headers) == status


def test_more_names_are_given() -> None:
    names = own_names("0.0.0.0", ["Teacher.example"])
    assert is_own("teacher.example:8000", names) and is_own(socket.gethostname(), names)
    assert not is_own("teacher.example", own_names("0.0.0.0"))


def test_a_post_by_another_name_is_not_read(one: TeacherServer) -> None:
    data = BODY.replace(b"localhost", b"evil.example")
    with half_sent(one, data) as raw:
        assert ends(raw).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    ("header", "path", "status"),
    [
        ("Transfer-Encoding: chunked", "/score", 411),
        (f"Content-Length: {(8 << 20) + 1}", "/v1/completions", 413),
        (f"Content-Length: {(1 << 28) + 1}", "/score", 413),
        (f"Content-Length: {1 << 28}", "/nowhere", 413),
    ],
)
def test_bodies_have_a_size(header: str, path: str, status: int, one: TeacherServer) -> None:
    """In JSON a smaller one: eight million bytes of empty lists are half a GiB."""
    with half_sent(
        one, f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode()
    ) as raw:
        assert ends(raw).startswith(f"HTTP/1.1 {status}".encode())


def test_requests_share_a_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of 4 bytes in a room of 8: the third waits for one of the others."""
    monkeypatch.setattr(gate, "WAIT", 0.05)
    room, came = Room(8), []
    go = threading.Event()

    def take(size: int) -> None:
        try:
            room.take(size)
            came.append(size)
            go.wait(10)
        except BadRequest as error:
            came.append(-error.status)
        finally:
            room.release()

    def started(size: int) -> Any:
        thread = threading.Thread(target=take, args=(size,))
        thread.start()
        return thread

    first = [started(4), started(4)]
    while len(came) < 2:
        time.sleep(0.001)
    started(4).join()
    assert came == [4, 4, -503]
    go.set()
    for thread in first:
        thread.join()
    started(1000).join()  # more than there is: all of it
    assert came[3:] == [1000] and room.taken == 0
