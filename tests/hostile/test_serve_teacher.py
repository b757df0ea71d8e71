"""`opdkit serve-teacher` under load that is meant to end it: 400 half-sent requests, and bodies
that claim, nest and announce more than there is.
"""

from __future__ import annotations

import json
import random
import socket
from contextlib import ExitStack, suppress

import httpx2
import pytest
import torch

from opdkit.teachers import protocol
from opdkit.teachers.http import CONNECTIONS, TeacherServer
from tests.common.tiny import tiny_model
from tests.hostile.test_servers import MEMORY, judged, peak
from tests.teachers.test_gate import ends, half_sent, threads
from tests.teachers.test_serve import serving, url

pytestmark = pytest.mark.hostile


def test_400_half_sent_requests() -> None:
    with serving(tiny_model("llama")) as (one,), ExitStack() as stack:
        before = threads()
        for _ in range(400):
            with suppress(OSError):
                stack.enter_context(half_sent(one))
        assert httpx2.get(url(one) + "/v1/models", timeout=30).status_code == 200
        assert threads() - before <= CONNECTIONS + 1


def bodies() -> dict[str, tuple[str, bytes]]:
    """Path and body of requests that no server should answer with numbers, nor fall over."""
    rng = random.Random(0)
    made = {
        "8 MB of empty lists": ("/v1/completions", b"[" + b"[]," * 2_700_000 + b"[]]"),
        "8 MB of brackets": ("/v1/completions", b"[" * (8 << 20)),
        "a million prompts": (
            "/v1/completions",
            json.dumps({"prompt": [[1]] * 10**6, "max_tokens": 0, "prompt_logprobs": 300}).encode(),
        ),
        "a header of 2^62 bytes": ("/score", (1 << 62).to_bytes(8, "little") + b"{}"),
        "a header of 100,000 brackets": (
            "/score",
            (100_000).to_bytes(8, "little") + b"[" * 100_000,
        ),
    }
    for shape in ([10**18], [2**32, 2**32]):
        said = {"tokens": {"dtype": "I64", "shape": shape, "data_offsets": [0, 8]}}
        text = json.dumps(said).encode()
        made[f"tokens of {shape}"] = ("/score", len(text).to_bytes(8, "little") + text + bytes(8))
    for i in range(40):  # anything
        path = rng.choice(["/score", "/v1/completions", "/head", "/%00", "/../../etc/passwd"])
        made[f"noise {i}"] = (path, rng.randbytes(rng.randint(0, 2000)))
    for responses in ([10**9], [10**9, -(10**9) + 3], [2**62, 2**62]):
        one = torch.tensor([1])
        tensors = {
            "tokens": torch.tensor([1, 2, 3]),
            "prompts": torch.ones(len(responses), dtype=torch.int64),
            "responses": torch.tensor(responses),
            "positions": one,
        }
        settings = {"rollouts": ["r"] * len(responses), "facts": [], "ids": [], "vocab": None}
        made[f"responses of {responses}"] = ("/score", protocol.pack(tensors, settings))
    return made


def status(server: TeacherServer, path: str, body: bytes) -> int:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    with half_sent(server, f"{head}Content-Length: {len(body)}\r\n\r\n".encode()) as raw:
        with suppress(OSError):
            raw.sendall(body)
            raw.shutdown(socket.SHUT_WR)
        said = ends(raw)
    return int(said.split()[1]) if said.startswith(b"HTTP/1.1 ") else 0


def test_bodies_that_are_meant_to_end_it() -> None:
    results = {}
    with serving(tiny_model("llama")) as (one,):
        for name, (path, body) in bodies().items():
            peak()
            before = peak()
            told = status(one, path, body)
            grown = peak() - before
            results[name] = (
                f"status {told}"
                if not 400 <= told < 500
                else f"{grown >> 20} MiB"
                if grown > 2 * MEMORY
                else ""
            )
        assert httpx2.get(url(one) + "/v1/models").status_code == 200
    judged("serve-teacher, bodies", results)
