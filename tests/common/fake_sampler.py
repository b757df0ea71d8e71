"""A stand-in for `vllm serve` that a run samples from: a copy of the student that takes weights as
vLLM's workers do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkit.models.engines.vllm_worker import _read
from tests.common.fake_server import Answer, FakeServer

PAUSE, RESUME, RESET = "/pause?mode=abort", "/resume", "/reset_prefix_cache"
RPC = "/collective_rpc"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
KNOWN = (PAUSE, RESUME, RESET, RPC, LOAD, UNLOAD)


@dataclass
class Vllm(FakeServer):
    """Draws the most probable token whatever is asked, and notes what changes it."""

    name: str = "student"
    calls: list[Any] = field(default_factory=list)  # path and body of what is no completion
    busy: bool = False  # its prefix cache cannot be reset
    deaf: bool = False  # weights are acknowledged and not taken
    ids: bool = True  # token ids are returned
    spoilt: dict[str, Any] = field(default_factory=dict)  # of a completion, in place of its own
    unknown: tuple[str, ...] = ()  # paths that it does not know
    adapters: list[str] = field(default_factory=list)  # that it knows

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions" and "prompt_logprobs" not in body:
            return self.draw(body)
        if path in ("/v1/completions", "/v1/models"):
            return super().answer(path, body)
        self.calls.append((path, body))
        if path not in KNOWN or path in self.unknown:
            raise Answer(404, "Not Found")
        if path == RESET:
            return {"success": not self.busy}
        if path == RPC and body["method"] == "opdkit_load_folder" and not self.deaf:
            self.model.load_state_dict(dict(_read(Path(body["args"][0]))), strict=False)
        if path == UNLOAD and body["lora_name"] not in self.adapters:
            raise Answer(404, "The lora adapter cannot be found.")
        if path == LOAD:
            self.name = body["lora_name"]
            self.adapters.append(self.name)
        return {"results": [0]}

    def draw(self, body: dict[str, Any]) -> Any:
        self.check(body["prompt"], body["model"])
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < body["max_tokens"] and not (
            tokens and tokens[-1] in body.get("stop_token_ids", ())
        ):
            row = self.logps([*body["prompt"], *tokens, 0])[-1]
            tokens.append(int(row.argmax()))
            logps.append(float(row.max()))
        ended = "stop" if tokens[-1] in body.get("stop_token_ids", ()) else "length"
        choice = {"index": 0, "finish_reason": ended, "logprobs": {"token_logprobs": logps}}
        return {
            "model": self.name,
            "choices": [
                choice | ({"token_ids": tokens} if self.ids else {"text": "x"}) | self.spoilt
            ],
        }
