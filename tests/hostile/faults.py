"""A server of one of the two wires whose answers go wrong in one chosen way."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import torch
from torch import Tensor

from opdkit.teachers import protocol
from opdkit.teachers.service import Service
from tests.common.fake_server import FakeServer

KEY = "sk-open-sesame-0123456789"
SCORES = ("/v1/completions", "/score", "/generate")  # paths of requests for scores


@dataclass
class Said:
    """What a server is about to answer, and to whom."""

    body: bytes
    request: bytes
    handler: _Handler
    former: bytes  # an answer before
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """One way to go wrong.

    Arguments:
        name: says which.
        change: of what is about to be said; returns whether it is still to be sent.
        path: whose answers it is about; empty: those of requests for scores.
        harmless: right numbers may come of it.
        of_states: hidden states can go wrong so.
    """

    name: str
    change: Callable[[Said], bool | None]
    path: str = ""
    harmless: bool = False
    of_states: bool = True

    def about(self, path: str) -> bool:
        return path == self.path if self.path else path in SCORES


@dataclass
class Server:
    """`with Server(truth) as server:` answers at `server.url` as `truth`, a FakeServer or a
    Service, would; with `fault` set, not quite.
    """

    truth: FakeServer | Service
    fault: Fault | None = None
    former: bytes = b""  # its first answer about scores

    def __enter__(self) -> Self:
        handler = type("BoundHandler", (_Handler,), {"of": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.over = threading.Event()
        loop = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, path: str, body: bytes) -> bytes:
        if isinstance(self.truth, FakeServer):
            return json.dumps(self.truth.answer(path, json.loads(body or b"{}"))).encode()
        routes: dict[str, Callable[[], Any]] = {
            "/v1/models": lambda: {"object": "list", "data": [self.truth.about.card()]},
            "/tokenizer": self.truth.vocabulary,
            "/head": self.truth.head,
            "/score": lambda: self.truth.score(body),
        }
        value = routes[path]()
        self.truth.room.release()
        return value if isinstance(value, bytes) else json.dumps(value).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Server

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.path = self.path.partition("?")[0]  # of the only model
        request = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = self.of.answer(self.path, request)
        said = Said(body, request, self, self.of.former)
        if isinstance(self.of.truth, Service):
            said.headers[protocol.FINGERPRINT] = self.of.truth.fingerprint
        fault = self.of.fault
        with suppress(OSError):
            if fault is None or not fault.about(self.path):
                if self.path in SCORES:
                    self.of.former = self.of.former or body
                self.send(said)
            elif fault.change(said) is not False:
                self.send(said)
            else:
                self.close_connection = True

    def send(self, said: Said) -> None:
        self.send_response(said.status)
        for name, value in ({"Content-Length": str(len(said.body))} | said.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said.body)

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


# ------------------------------------------------------------------------- of the transport, shared


def _sent(*pieces: bytes, endless: bytes = b"", pause: float = 0.0) -> Callable[[Said], bool]:
    """Bytes instead of an answer; then `endless` again and again, with pauses."""

    def change(said: Said) -> bool:
        for piece in pieces:
            said.handler.raw(piece)
        while endless and not said.handler.of.over.wait(pause):
            said.handler.raw(endless)
        return False

    return change


def _with(status: int = 200, body: bytes | None = None, **headers: str) -> Callable[[Said], None]:
    def change(said: Said) -> None:
        said.status = status
        said.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        said.body = said.body if body is None else body

    return change


def _silent(said: Said) -> bool:
    said.handler.of.over.wait(20)
    return False


def _reset(said: Said) -> bool:
    linger = b"\1\0\0\0\0\0\0\0"
    said.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    said.handler.connection.close()
    return False


def _half(said: Said) -> None:
    said.headers["Content-Length"] = str(len(said.body))
    said.body = said.body[: len(said.body) // 2]
    said.handler.close_connection = True


def _bomb(encoding: str) -> Callable[[Said], None]:
    """1 GiB of spaces in 1 MB."""

    def change(said: Said) -> None:
        packer = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
        parts = [packer.compress(bytes(1 << 20)) for _ in range(1 << 10)]
        said.body = b"".join([*parts, packer.flush()])
        said.headers["Content-Encoding"] = encoding

    return change


def _dripped(said: Said) -> bool:
    """The answer, whole and right, a byte every tenth of a second."""
    said.handler.raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said.body))
    for i in range(len(said.body)):
        if said.handler.of.over.wait(0.1):
            break
        said.handler.raw(said.body[i : i + 1])
    return False


def _packed(said: Said) -> None:
    _with(body=gzip.compress(said.body), Content_Encoding="gzip")(said)


def _echo(status: int) -> Callable[[Said], None]:
    def change(said: Said) -> None:
        key = said.handler.headers["Authorization"].removeprefix("Bearer ")
        said.status, said.body = status, json.dumps({"error": f"{key} is no key of mine"}).encode()

    return change


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
TRANSPORT = [
    Fault("no answer", _silent),
    Fault("closes at once", lambda said: False),
    Fault("resets the connection", _reset),
    Fault("half of the body", _half),
    Fault("the body a byte at a time", _dripped),
    Fault("headers a byte at a time", _sent(OK, endless=b"a", pause=0.1)),
    Fault("a header now and then", _sent(OK, endless=b"A: b\r\n", pause=0.1)),
    Fault("endless headers", _sent(OK, endless=b"A: " + b"b" * 1000 + b"\r\n")),
    Fault("one endless header", _sent(OK + b"A: ", endless=b"b" * 65536)),
    Fault("endless interim answers", _sent(endless=b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.01)),
    Fault("an endless body", _sent(OK + b"\r\n", endless=b" " * 65536)),
    Fault(
        "an endless body in chunks",
        _sent(
            OK + b"Transfer-Encoding: chunked\r\n\r\n",
            endless=b"10000\r\n" + b" " * 65536 + b"\r\n",
        ),
    ),
    Fault("a chunk of 2^60 bytes", _sent(CHUNKED + b"1" + b"0" * 15)),
    Fault("a chunk of no size", _sent(CHUNKED + b"zz\r\n")),
    Fault("a length of 2^60", _sent(OK + b"Content-Length: 1152921504606846976\r\n\r\n{}")),
    Fault("a length of -1", _sent(OK + b"Content-Length: -1\r\n\r\n{}")),
    Fault("two lengths", _sent(OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}")),
    Fault("no HTTP", _sent(b"SSH-2.0-OpenSSH_9.6\r\n")),
    Fault("a status that is none", _sent(b"HTTP/1.1 999999 ?\r\n\r\n")),
    Fault("zero bytes", _sent(bytes(1 << 16))),
    Fault("gzip of 1 GiB", _bomb("gzip")),
    Fault("deflate of 1 GiB", _bomb("deflate")),
    Fault(
        "gzip, small and right",
        lambda s: _with(body=gzip.compress(s.body), Content_Encoding="gzip")(s),
    ),
    Fault("an encoding that is none", _with(Content_Encoding="rot13")),
    Fault("an empty body", _with(body=b"")),
    Fault("204", _with(204, b"")),
    Fault("302 to itself", _with(302, b"", Location="/score")),
    Fault("302 to nowhere", _with(302, b"", Location="http://[")),
    Fault("401 with the key in it", _echo(401)),
    Fault("500 with the key in it", _echo(500)),
    Fault("500 of 20 MB", _with(500, b"<html>" * 4_000_000)),
    Fault("503 for ever", _with(503, b"{}", Retry_After="1e99")),
    Fault("429 until a date that is none", _with(429, b"{}", Retry_After="\x7fsoon")),
    Fault("error text in control characters", _with(400, b'{"error": "\\u001b[2J"}')),
    Fault("HTML", _with(body=b"<html><body>It works!</body></html>")),
    Fault("bytes that are no text", _with(body=bytes(range(256)) * 40)),
]


# ----------------------------------------------------------------------------- of JSON, vLLM's wire


def _json(change: Callable[[Any], Any]) -> Callable[[Said], None]:
    """change: of the answer, in place, or to what it returns; bytes are sent as they are."""

    def changed(said: Said) -> None:
        value = json.loads(said.body)
        new = change(value)
        new = value if new is None else new
        said.body = new if isinstance(new, bytes) else json.dumps(new).encode()

    return changed


def _entries(change: Callable[[list[Any]], Any]) -> Callable[[Said], None]:
    """change: of the list of entries, in place, or to what it returns."""

    def changed(value: Any) -> None:
        choice = value["choices"][0]
        new = change(choice["prompt_logprobs"])
        if new is not None:
            choice["prompt_logprobs"] = new[0] if isinstance(new, tuple) else new

    return _json(changed)


def _each(change: Callable[[dict[str, Any]], Any]) -> Callable[[Said], None]:
    """change: of every number's record, in place."""

    def changed(entries: list[Any]) -> None:
        for entry in entries[1:]:
            for record in entry.values():
                change(record)

    return _entries(changed)


def _number(value: Any) -> Callable[[Said], None]:
    return _each(lambda record: record.update(logprob=value))


def _renamed(change: Callable[[str], str]) -> Callable[[Said], None]:
    """Of every entry's ids."""
    return _entries(
        lambda entries: [
            None,
            *({change(i): record for i, record in entry.items()} for entry in entries[1:]),
        ]
    )


def _former(said: Said) -> None:
    said.body = said.former


ON_JSON = [
    Fault("half of the JSON", lambda said: setattr(said, "body", said.body[: len(said.body) // 2])),
    Fault("an array", _json(lambda _: [1])),
    Fault("a number", _json(lambda _: 7)),
    Fault("null", _json(lambda _: b"null")),
    Fault("a thousand brackets", _json(lambda _: b"[" * 100_000)),
    Fault("a number of 5,000 digits", _json(lambda _: b'{"choices": ' + b"9" * 5000 + b"}")),
    Fault("30 MB of empty objects", _json(lambda _: b'{"a": [' + b"{}," * 10_000_000 + b"{}]}")),
    Fault(
        "UTF-16",
        lambda said: setattr(said, "body", said.body.decode().encode("utf-16")),
        harmless=True,  # JSON may be
    ),
    Fault("no choices", _json(lambda v: v.pop("choices") and None)),
    Fault("choices: null", _json(lambda v: v.update(choices=None))),
    Fault("choices: []", _json(lambda v: v.update(choices=[]))),
    Fault("two choices", _json(lambda v: v.update(choices=v["choices"] * 2))),
    Fault("choices: [text]", _json(lambda v: v.update(choices=["x"]))),
    Fault("choices: {}", _json(lambda v: v.update(choices={"0": 1}))),
    Fault("another model", _json(lambda v: v.update(model="somebody else"))),
    Fault("a model's name of 1 MB", _json(lambda v: v.update(model="x" * (1 << 20)))),
    Fault("the model is a list", _json(lambda v: v.update(model=["teacher"]))),
    Fault("no scores", _entries(lambda e: (None,))),
    Fault("scores: text", _entries(lambda e: ("x" * len(e),))),
    Fault("scores: an object", _entries(lambda e: ({str(i): x for i, x in enumerate(e)},))),
    Fault("one token short", _entries(lambda e: e.pop() and None)),
    Fault("one token more", _entries(lambda e: e.append(e[-1]))),
    Fault("shifted by one", _entries(lambda e: [None, *e[2:], e[-1]])),
    Fault("in reverse", _entries(lambda e: [None, *e[:0:-1]])),
    Fault("all null", _entries(lambda e: [None] * len(e))),
    Fault("the last null", _entries(lambda e: [*e[:-1], None])),
    Fault("the last a list", _entries(lambda e: [*e[:-1], [1, 2]])),
    Fault("the last a number", _entries(lambda e: [*e[:-1], -1.5])),
    Fault("ids in words", _renamed(lambda i: "token " + i)),
    Fault("ids with a point", _renamed(lambda i: i + ".5")),
    Fault("ids below 0", _renamed(lambda i: "-" + i)),
    Fault("ids of 30 digits", _renamed(lambda i: i + "0" * 29)),
    Fault("ids of others", _renamed(lambda i: str((int(i) + 1) % 320))),
    Fault("log-probs of 2.5", _number(2.5)),
    Fault("log-probs of -inf", _number(float("-inf"))),
    Fault("log-probs of vLLM's -inf", _number(-9999.0)),
    Fault("log-probs of inf", _number(float("inf"))),
    Fault("log-probs of nan", _number(float("nan"))),
    Fault("log-probs null", _number(None)),
    Fault("log-probs in words", _number("-1.5")),
    Fault("log-probs true", _number(True)),
    Fault("log-probs false", _number(False)),
    Fault("log-probs [-1.5]", _number([-1.5])),
    Fault("log-probs {}", _number({})),
    Fault("whole numbers", _each(lambda r: r.update(logprob=int(r["logprob"]) - 1))),
    Fault("probabilities", _each(lambda r: r.update(logprob=2.718281828 ** r["logprob"]))),
    Fault("more than the whole", _each(lambda r: r.update(logprob=-0.1))),
    Fault("records without a number", _each(lambda r: r.pop("logprob"))),
    Fault("a former answer", _former),
    Fault(
        "fewer than was asked",
        _entries(lambda e: [None, *(dict([next(iter(x.items()))]) for x in e[1:])]),
    ),
]


# ------------------------------------------------------------------------- of tensors, our own wire


def _tensors(
    change: Callable[[dict[str, Tensor]], Any], *, sealed: bool = True
) -> Callable[[Said], None]:
    """change: of the answer's tensors, in place. sealed: the digest fits what it has become."""

    def changed(said: Said) -> None:
        tensors, settings = protocol.unpack(said.body)
        change(tensors)
        if sealed:
            settings["answers"] = protocol.seal(said.request, tensors)
        said.body = protocol.pack(tensors, settings)

    return changed


def _all(change: Callable[[Tensor], Tensor], *, sealed: bool = True) -> Callable[[Said], None]:
    return _tensors(lambda t: t.update({name: change(x) for name, x in t.items()}), sealed=sealed)


def _floats(change: Callable[[Tensor], Tensor], *, sealed: bool = True) -> Callable[[Said], None]:
    return _all(lambda x: change(x) if x.is_floating_point() else x, sealed=sealed)


def _ints(change: Callable[[Tensor], Tensor]) -> Callable[[Said], None]:
    return _all(lambda x: x if x.is_floating_point() else change(x))


def _settings(change: Callable[[dict[str, Any]], Any]) -> Callable[[Said], None]:
    def changed(said: Said) -> None:
        tensors, settings = protocol.unpack(said.body)
        change(settings)
        said.body = protocol.pack(tensors, settings)

    return changed


def _first(value: float) -> Callable[[Tensor], Tensor]:
    """One number of them all is another."""

    def changed(x: Tensor) -> Tensor:
        x.view(-1)[0] = value
        return x

    return changed


def _header(text: bytes, length: int | None = None) -> Callable[[Said], None]:
    size = (len(text) if length is None else length).to_bytes(8, "little")
    return _with(body=size + text + bytes(64))


ON_TENSORS = [
    Fault("in reverse, unsealed", _all(lambda x: x.flip(0), sealed=False)),
    Fault("shifted, unsealed", _all(lambda x: x.roll(1, 0), sealed=False)),
    Fault("zeros, unsealed", _all(torch.zeros_like, sealed=False)),
    Fault("a little more, unsealed", _floats(lambda x: x * 1.01, sealed=False)),
    Fault("a former answer", _former),
    Fault("no seal", _settings(lambda s: s.clear())),
    Fault("a seal that is a list", _settings(lambda s: s.update(answers=[1]))),
    Fault("log-probs of 2.5", _floats(lambda x: torch.full_like(x, 2.5)), of_states=False),
    Fault("one log-prob of 2.5", _floats(_first(2.5)), of_states=False),
    Fault("one log-prob of -inf", _floats(_first(float("-inf")))),
    Fault("one nan", _floats(_first(float("nan")))),
    Fault("one inf", _floats(_first(float("inf")))),
    Fault("the sign changed", _floats(torch.neg), of_states=False),
    Fault("probabilities", _floats(torch.exp), of_states=False),
    Fault("whole numbers", _floats(lambda x: x.long()), of_states=False),
    Fault("float16", _floats(lambda x: x.half())),
    Fault("bfloat16", _floats(lambda x: x.bfloat16())),
    Fault("float64", _floats(lambda x: x.double())),
    Fault("ids as int32", _ints(lambda x: x.int()), of_states=False),
    Fault("ids as numbers", _ints(lambda x: x.float()), of_states=False),
    Fault("ids below 0", _ints(lambda x: -x - 1), of_states=False),
    Fault("ids beyond the vocabulary", _ints(lambda x: x + 320), of_states=False),
    Fault("ids all the same", _ints(torch.zeros_like), of_states=False),
    Fault(
        "the least probable first",
        _all(lambda x: x.flip(-1) if x.dim() == 2 else x),
        of_states=False,
    ),
    Fault("one position short", _all(lambda x: x[:-1])),
    Fault("one position more", _all(lambda x: torch.cat([x, x[-1:]]))),
    Fault("no position", _all(lambda x: x[:0])),
    Fault("a dimension more", _all(lambda x: x[..., None])),
    Fault("a column more", _all(lambda x: torch.cat([x, x[:, -1:]], 1) if x.dim() == 2 else x)),
    Fault("a tensor missing", _tensors(lambda t: t.pop("0")), of_states=False),
    Fault("a tensor more", _tensors(lambda t: t.update(more=torch.zeros(3)))),
    Fault("no tensor", _tensors(lambda t: t.clear())),
    Fault(
        "two names changed",
        _tensors(lambda t: t.update({"0": t["1"], "1": t["0"]})),
        of_states=False,
    ),
    Fault("other weights' header", _with(X_Opdkit_Model="0123456789abcdef")),
    Fault("an empty header of weights", _with(X_Opdkit_Model="")),
    Fault("a body cut short", lambda said: setattr(said, "body", said.body[:-1])),
    Fault("a header of 2^60 bytes", _header(b"{}", 1 << 60)),
    Fault("a header that is no JSON", _header(b"{{{{")),
    Fault("a header of a thousand brackets", _header(b"[" * 50_000)),
    Fault(
        "a shape of 10^18",
        _header(b'{"0":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,64]}}'),
    ),
    Fault("an unknown dtype", _header(b'{"0":{"dtype":"F3","shape":[16],"data_offsets":[0,64]}}')),
    Fault("JSON", _with(body=b'{"0": [-1.5]}')),
]

# ------------------------------------------------------------------ of what is asked at the start


def _card(**changes: Any) -> Callable[[Said], None]:
    return _json(lambda v: v["data"][0].update(changes))


def _about(**changes: Any) -> Callable[[Said], None]:
    return _json(lambda v: v["data"][0]["opdkit"].update(changes))


MODELS = "/v1/models"
AT_START = [
    Fault("no models", _json(lambda v: v.update(data=[])), MODELS),
    Fault("models: null", _json(lambda v: v.update(data=None)), MODELS),
    Fault("models: text", _json(lambda v: v.update(data="teacher")), MODELS),
    Fault("models: numbers", _json(lambda v: v.update(data=[1])), MODELS),
    Fault("a name that is a number", _card(id=7), MODELS),
    Fault("a card without a name", _json(lambda v: v["data"][0].pop("id") and None), MODELS),
    Fault("a context in words", _card(max_model_len="4096"), MODELS),
    Fault("a context below 0", _card(max_model_len=-5), MODELS),
    Fault("an endless list", _sent(OK + b"\r\n", endless=b" " * 65536), MODELS),
    Fault("a list a byte at a time", _dripped, MODELS),
]
AT_OWN_START = [
    Fault("a card that is text", _card(opdkit="yes"), MODELS),
    Fault("rows in words", _about(rows="320"), MODELS),
    Fault("10^12 rows", _about(rows=10**12), MODELS),
    Fault("no columns", _about(columns=0), MODELS),
    Fault("weights that are a list", _about(fingerprint=[1]), MODELS),
    Fault("micro-batches of -1", _about(micro_batch_tokens=-1), MODELS),
    Fault("in reverse, sealed", _all(lambda x: x.flip(0))),
    Fault("shifted, sealed", _all(lambda x: x.roll(1, 0))),
]
AT_HEAD = [
    Fault("a head cut short", lambda said: setattr(said, "body", said.body[:-1]), "/head"),
    Fault("a head of nan", _all(lambda x: x * float("nan")), "/head"),
    Fault("a head of another shape", _all(lambda x: x[:-1]), "/head"),
    Fault("a head of whole numbers", _all(lambda x: x.long()), "/head"),
    Fault("a scale in words", _settings(lambda s: s.update(scale="1")), "/head"),
    Fault("an endless head", _sent(OK + b"\r\n", endless=bytes(65536)), "/head"),
    Fault("a head of other weights", _with(X_Opdkit_Model="0123456789abcdef"), "/head"),
]
