"""A stand-in for vLLM or SGLang on a real socket, a tiny model behind it, with faults that happen
at chosen requests.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Fault:
    """What goes wrong, from which request for scores on (counted from 1), and how often (0: from
    then on always).

    die: the server is gone. close: the connection ends in the middle of the answer. hang: no
    answer. 500 and the like: that status. nan, null: one number is none. shifted: scores one token
    early. short: the last token's are missing. other: another model answers. broken: half of the
    JSON.
    """

    kind: str
    at: int = 1
    times: int = 1

    def now(self, number: int) -> bool:
        return number >= self.at and (self.times == 0 or number < self.at + self.times)


class Answer(Exception):
    """An error status with its body."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class FakeServer:
    """`with FakeServer(model, tokenizer) as server:` serves at `server.url`.

    kind: vllm or sglang, as their /v1/models say.
    """

    model: Any
    tokenizer: Any
    kind: str = "vllm"
    faults: Sequence[Fault] = ()
    name: str = "teacher"
    port: int = 0
    max_logprobs: int = 20
    max_model_len: int | None = 4096
    retry_after: str | None = None  # sent with every error
    at_ids: bool = False  # vLLM 0.32's prompt_logprob_token_ids
    # bodies of the requests for scores
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)  # of all requests

    def __post_init__(self) -> None:
        self.lock, self.released = threading.Lock(), threading.Event()
        self.scored, self.dead = 0, False

    def __enter__(self) -> Self:
        handler = type("BoundHandler", (_Handler,), {"fake": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True
        )
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -------------------------------------------------------------------------------------- answers

    def logps(self, tokens: Sequence[int]) -> Tensor:
        """[L, V]: row i is what the model says of token i; row 0, which nothing precedes, is of no
        use.
        """
        with self.lock, torch.no_grad():
            logits = self.model(input_ids=torch.tensor([list(tokens)])).logits[0].float()
        return torch.cat([logits[:1], logits[:-1]]).log_softmax(-1)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        routes: dict[tuple[str, str], Callable[[dict[str, Any]], Any]] = {
            ("vllm", "/v1/completions"): self.completions,
            ("vllm", "/inference/v1/generate"): self.generate_vllm,
            ("sglang", "/generate"): self.generate_sglang,
        }
        if path == "/v1/models":
            card = {
                "id": self.name,
                "object": "model",
                "owned_by": self.kind,
                "max_model_len": self.max_model_len,
            }
            return {"object": "list", "data": [card]}
        if (self.kind, path) not in routes:
            raise Answer(404, "Not Found")
        return routes[self.kind, path](body)

    def check(self, tokens: Sequence[int], model: str | None) -> None:
        if model is not None and model != self.name:
            raise Answer(404, f"The model `{model}` does not exist.")
        if max(tokens) >= self.model.config.vocab_size:
            raise Answer(400, f"Token id {max(tokens)} is out of vocabulary")
        if self.max_model_len is not None and len(tokens) >= self.max_model_len:
            raise Answer(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens. However, you "
                f"requested 1 output tokens and your prompt contains {len(tokens)} input tokens.",
            )

    def completions(self, body: dict[str, Any]) -> Any:
        """vLLM's prompt_logprobs: the k most probable ids and the token itself, in no order that
        could be relied on.
        """
        tokens, k = body["prompt"], body["prompt_logprobs"]
        self.check(tokens, body["model"])
        if k > self.max_logprobs:
            raise Answer(
                400,
                f"Requested prompt logprobs of {k}, which is greater than max allowed: "
                f"{self.max_logprobs}",
            )
        logps = self.logps(tokens)
        entries: list[Any] = [None]
        for row, token in zip(logps[1:], tokens[1:]):
            ids = [token, *(i for i in row.topk(k).indices.tolist() if i != token)]
            entries.append({str(i): self.entry(row, i) for i in ids})
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": entries}
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": self.name,
            "choices": [choice],
        }

    def entry(self, row: Tensor, i: int) -> dict[str, Any]:
        rank = int((row > row[i]).sum()) + 1
        return {"logprob": row[i].item(), "rank": rank, "decoded_token": self.tokenizer.decode([i])}

    def generate_vllm(self, body: dict[str, Any]) -> Any:
        tokens, wanted = body["token_ids"], body["sampling_params"]
        self.check(tokens, body["model"])
        if not self.at_ids:
            raise Answer(
                400,
                "prompt_logprob_token_ids requires the V2 model runner "
                "(VLLM_USE_V2_MODEL_RUNNER=1).",
            )
        ids = torch.tensor(wanted["prompt_logprob_token_ids"])
        scores = self.logps(tokens)[wanted["prompt_logprob_start"] + 1 :].gather(1, ids)
        buffer = io.BytesIO()
        np.save(buffer, scores.numpy())
        return {
            "model": self.name,
            "choices": [],
            "prompt_token_id_logprobs": base64.b64encode(buffer.getvalue()).decode(),
        }

    def generate_sglang(self, body: dict[str, Any]) -> Any:
        tokens, start = body["input_ids"], body["logprob_start_len"]
        self.check(tokens, None)
        text = self.tokenizer.decode if body.get("return_text_in_logprobs") else lambda _: None
        logps, meta = self.logps(tokens), {}
        rows = list(zip(logps[start + 1 :], tokens[start + 1 :]))

        def say(row: Tensor, ids: Sequence[int]) -> list[Any]:
            return [[row[i].item(), i, text([i])] for i in ids]

        last = logps.shape[1] - 1  # SGLang writes 0 for the last id
        own = [[r[t].item(), t if t < last else 0, text([t if t < last else 0])] for r, t in rows]
        meta["input_token_logprobs"] = [[None, tokens[start], text([tokens[start]])], *own]
        if k := body.get("top_logprobs_num"):
            meta["input_top_logprobs"] = [
                None,
                *(say(r, r.topk(k).indices.tolist()) for r, _ in rows),
            ]
        if ids := body.get("token_ids_logprob"):
            meta["input_token_ids_logprobs"] = [None, *(say(r, ids) for r, _ in rows)]
        return {"text": "", "meta_info": meta}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeServer

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, body: dict[str, Any]) -> None:
        fake = self.fake
        if fake.dead:  # by a connection from before
            self.gone()
            return
        fake.headers.append(dict(self.headers))
        fault = None
        if self.command == "POST":
            with fake.lock:
                fake.requests.append(body)
                fake.scored += 1
                fault = next((f for f in fake.faults if f.now(fake.scored)), None)
        if fault is not None and self.fails(fault):
            return
        try:
            status, value = 200, fake.answer(self.path, body)
        except Answer as error:
            status, value = (
                error.status,
                {
                    "error": {
                        "message": error.message,
                        "type": "BadRequestError",
                        "code": error.status,
                    }
                },
            )
        if fault is not None and status == 200:
            spoil(fault.kind, value)
        self.write(status, json.dumps(value).encode(), None if fault is None else fault.kind)

    def fails(self, fault: Fault) -> bool:
        """Faults instead of an answer."""
        if fault.kind == "die":
            self.fake.dead = True
            # refuses at once; closing alone waits for the loop that polls it
            with suppress(OSError):  # it has been closed already
                self.fake.http.socket.shutdown(socket.SHUT_RDWR)
            self.fake.http.socket.close()
            threading.Thread(target=self.fake.http.shutdown, daemon=True).start()
        elif fault.kind == "hang":
            self.fake.released.wait(10)
        elif fault.kind.isdigit():
            self.write(int(fault.kind), b'{"error": {"message": "out of memory"}}', None)
            return True
        else:
            return False
        self.gone()
        return True

    def gone(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def write(self, status: int, body: bytes, fault: str | None) -> None:
        self.send_response(status)
        if fault == "broken":
            body = body[: len(body) // 2]
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200 and self.fake.retry_after is not None:
            self.send_header("Retry-After", self.fake.retry_after)
        self.end_headers()
        if fault == "close":
            self.wfile.write(body[: len(body) // 2])
            self.gone()
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def spoil(kind: str, value: dict[str, Any]) -> None:
    """Faults in an answer of vLLM's form, in place."""
    if kind == "other":
        value["model"] = "somebody else"
        return
    entries = value["choices"][0]["prompt_logprobs"]
    if kind in ("nan", "null"):
        next(iter(entries[-1].values()))["logprob"] = float("nan") if kind == "nan" else None
    elif kind == "shifted":
        entries[:] = [None, *entries[2:], entries[-1]]
    elif kind == "short":
        entries.pop()
