"""The sampler that asks `vllm serve`: token ids over HTTP, and after every optimiser step the
student's weights through a shared folder.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import Endpoint
from opdkit.models.engines.exchange import MOST, Broken, Reply, addresses, object_of, shown
from opdkit.models.engines.names import card_of, cards_of
from opdkit.models.engines.probe import Probe
from opdkit.models.engines.prompt_logprobs import number_of, parse_prompt_logprobs
from opdkit.models.engines.weights import (
    DTYPES,
    adapter_rank,
    checkpoint_weights,
    engine_dtype,
    save_adapters,
    save_weights,
)
from opdkit.models.held import Held
from opdkit.models.load import CausalLM
from opdkit.objective.head import Head
from opdkit.sampling.check import check_model
from opdkit.sampling.respond import (
    HOTTEST,
    Drawn,
    EngineSampler,
    Request,
    ended,
    head_now,
    padded,
    real_rows,
    shape_of,
)
from opdkit.sampling.settings import SamplerContext, SamplerSettings, Sizes
from opdkit.types import Sampler, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls "
    "opdkit.models.engines.vllm_worker.Weights --logprobs-mode processed_logprobs --host 127.0.0.1"
)
ADAPTERS = f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 {COMMAND} --enable-lora --max-lora-rank RANK"
ENTRY = 1024  # bytes of JSON, at most, about one token: its id, text and log-prob
ROUNDING = 1e-3  # nats: by so much a log-prob may be above 0
SAME = 0.1  # nats: two log-probs of one token, drawn at temperature 2, are of the same distribution


@dataclass(frozen=True)
class ServerSettings(SamplerSettings):
    """Which servers sample, and how the student's weights reach them.

    The servers are started by hand: with `COMMAND` above, or with `ADAPTERS` for enable_lora; on a
    CPU with --no-enable-chunked-prefill, too. They obey anyone who reaches them, also when told to
    load weights: keep them to this machine or a network of your own.
    """

    kind = "server"
    elsewhere = True
    urls: tuple[str, ...]
    model: str | None = None  # the name it is served under; null: the only one there
    # that trainer and servers see under the same path; null: a temporary one of this machine
    shared_folder: str | None = None
    # of a student with adapters send these alone; else the weights with the adapters added to them
    enable_lora: bool = False
    dtype: str | None = None  # the servers compute in it (their --dtype); null: the student's
    concurrency: int = 64  # requests under way at once, over all urls
    timeout: float = 600.0  # seconds for one request
    retries: int = 5  # of what can succeed: refused connections, time-outs, 429, 5xx
    # environment variable that holds the key; keys are never written to a run
    api_key_env: str | None = None
    # nats, between server and trainer (see `probe`); null: by dtype
    sync_tolerance: float | None = None

    def __post_init__(self) -> None:
        addresses(self.urls, "the sampling server")
        if not self.urls:
            raise ValueError(
                "a sampling server needs at least one url, such as http://127.0.0.1:8000"
            )
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise ValueError("concurrency must be at least 1, timeout positive, retries at least 0")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype={self.dtype!r} must be one that vLLM computes in: {', '.join(DTYPES)}"
            )

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        return {"urls": text.split(",")}

    def open(self, context: SamplerContext) -> Sampler:
        # of the products, whatever the weights that learn are kept in
        dtype = self.dtype or ("bfloat16" if context.products == "bfloat16" else None)
        settings = replace(self, dtype=dtype)
        return ServerSampler(context.model, context.tokenizer, settings, head=context.head_now)

    def room(self, sizes: Sizes) -> None:
        return None

    def pace(self, student: Held, products: str, launch: float, graph: float) -> None:
        return None


class ServerSampler(EngineSampler):
    """Samples from vLLM servers that follow `model`, a Hugging Face model that trains in this
    process.

    Started with `--load-format dummy` a server proves at the first probe that all its weights come
    from here. As with `VllmSampler`, both log-probs are exact; with temperature or cuts the servers
    need `--logprobs-mode processed_logprobs`.
    """

    gives_each = True  # it takes `each`

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        settings: ServerSettings,
        *,
        head: Callable[[], Head] | None = None,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        head = head or head_now(model, tokenizer)
        self.head = shape_of(head())
        if settings.enable_lora:
            adapter_rank(model)
        self.endpoint = Endpoint(
            settings.urls,
            settings.concurrency,
            settings.timeout,
            settings.retries,
            settings.api_key_env,
            "the sampling server",
        )
        self.served, self.limit = _served(self.endpoint, settings.model)
        self.name = self.served  # asked for in requests: of the model, or of the adapters on it
        self._files, self.folder = _folder(settings)
        self.run = uuid.uuid4().hex[:8]  # a server may know adapters of an earlier run
        self.dtype = DTYPES[engine_dtype(model, settings.dtype)]
        if padded(self.head) or settings.enable_lora:
            self._call("opdkit_head", real_rows(self.head))
        self.probe = [
            Probe(model, tokenizer, head, self.dtype, self.limit, settings.sync_tolerance)
            for _ in settings.urls
        ]
        # optimiser steps of the weights in the servers; None: none were sent yet
        self.version: int | None = None
        # whether their log-probs are of the drawing distribution; None: not asked yet
        self.processed: bool | None = None

    # ----------------------------------------------------------------------------------------- sync

    def sync(self, model: CausalLM, version: int) -> None:
        """After an optimiser step: every server takes the student's weights over, forgets what
        older ones computed, and is probed.
        """
        self.staged(model, version)()

    def staged(self, model: CausalLM, version: int) -> Callable[[], None]:
        """The first half of `sync`: what is sent, as files, and what the probe expects of it."""
        check_model(self.model, model)
        folder = self.folder / f"student-{self.run}-{version}"
        if self.settings.enable_lora:
            save_adapters(self.model, folder)
        else:
            save_weights(checkpoint_weights(self.model), folder, self.dtype)
        return partial(self._send, folder, self.probe[0].expected(), version)

    def _send(self, folder: Path, expected: torch.Tensor, version: int) -> None:
        """The second half, with the log-probs [N] that are expected of the probe."""
        try:
            if self.settings.enable_lora:
                self._send_adapters(folder, version)
            else:
                self._send_weights(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for probe, one in zip(self.probe, self.endpoint.each()):
            probe.check(
                self._probed(one, probe),
                expected,
                version,
                f"sending {'adapters' if self.settings.enable_lora else 'weights'} to "
                f"{one.urls[0]}",
            )
        self.version = version

    def _probed(self, one: Endpoint, probe: Probe) -> list[torch.Tensor]:
        """Log-probs [T - 1] of each of the probe's sequences of T tokens, by one server."""
        return [
            torch.tensor(self._scores(one, s, 1, who))
            for s, who in zip(probe.sequences, probe.names)
        ]

    def _send_weights(self, folder: Path) -> None:
        self._call("opdkit_load_folder", str(folder))
        for one in self.endpoint.each():
            if one.post("/reset_prefix_cache", {}).get("success") is not True:
                raise UserError(
                    f"{one.urls[0]} kept what older weights computed (its prefix cache): others "
                    "are asking it for samples too. Give the run a server of its own"
                )

    def _send_adapters(self, folder: Path, version: int) -> None:
        name, former = f"student-{self.run}-{version}", self.name
        for one in self.endpoint.each():
            _ask(
                one,
                "/v1/load_lora_adapter",
                {"lora_name": name, "lora_path": str(folder)},
                ADAPTERS,
            )
            if former != self.served:
                _ask(one, "/v1/unload_lora_adapter", {"lora_name": former}, ADAPTERS)
        self.name = name

    def _call(self, method: str, argument: Any) -> None:
        """A method of `vllm_worker.Weights` on every server."""
        command = ADAPTERS if self.settings.enable_lora else COMMAND
        for one in self.endpoint.each():
            _ask(one, "/collective_rpc", {"method": method, "args": [argument]}, command)

    # --------------------------------------------------------------------------------------- sample

    @property
    def behind(self) -> bool:
        return self.version is None

    def ready(self, sampling: Sampling, policy_version: int) -> None:
        if not sampling.plain and sampling.temperature > 0:
            self._check_mode()

    def draw(self, requests: Sequence[Request], tick: Callable[[int], None] | None) -> list[Drawn]:
        """A continuation of each."""
        faults = self.endpoint.faults
        calls = [partial(self._drawn, self.endpoint, request) for request in requests]
        drawn = self.endpoint.map(calls, tick)
        if self.endpoint.faults > faults:  # a server may have been started again
            for probe, one in zip(self.probe, self.endpoint.each()):
                probe.repeat(self._probed(one, probe), one.urls[0])
        return drawn

    def score(
        self, sequences: Sequence[list[int]], starts: Sequence[int], who: Sequence[str]
    ) -> list[list[float]]:
        """Log-probs of sequence[start:] under the plain softmax."""
        return self.endpoint.map(
            [
                partial(self._scores, self.endpoint, s, a, w)
                for s, a, w in zip(sequences, starts, who)
            ]
        )

    def _drawn(self, endpoint: Endpoint, request: Request) -> Drawn:
        # whatever the checkpoint's own generation settings say
        neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        settings = request.settings | neutral | {"return_token_ids": True}
        longest, rows = request.settings["max_tokens"], real_rows(self.head)

        def read(choice: dict[str, Any], who: str) -> Drawn:
            tokens, logps = (
                choice.get("token_ids"),
                (choice.get("logprobs") or {}).get("token_logprobs"),
            )
            if not isinstance(tokens, list) or not isinstance(logps, list):
                raise UserError(
                    f"{who}: the sampling server does not return token ids with their log-probs: "
                    "opdkit never encodes a text again, as that changes tokens. Use vLLM 0.32 or "
                    "newer"
                )
            if choice.get("prompt_token_ids") not in (None, request.tokens):
                raise Broken("it is an answer to another prompt")
            if not len(tokens) == len(logps) <= longest:
                raise Broken(
                    f"{len(tokens)} tokens and {len(logps)} log-probs, of at most {longest}"
                )
            if wrong := [t for t in tokens if type(t) is not int or not 0 <= t < rows]:
                raise Broken(f"token {shown(repr(wrong[0]))} is none of the student's {rows}")
            numbers = [number_of(x) for x in logps]
            if above := [x for x in numbers if x > ROUNDING]:
                raise Broken(f"a log-prob of {above[0]:g}")
            return Drawn(tokens, numbers, ended(choice.get("finish_reason")))

        made = self._complete(endpoint, request.who, request.tokens, settings, read, longest)
        if request.told is not None:
            request.told(made)
        return made

    def _scores(self, endpoint: Endpoint, tokens: list[int], start: int, who: str) -> list[float]:
        def read(choice: dict[str, Any], who: str) -> list[float]:
            entries = choice.get("prompt_logprobs")
            return parse_prompt_logprobs(entries, tokens, start, 0, who).logp.tolist()

        settings = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        return self._complete(endpoint, who, tokens, settings, read, 1)

    def _complete(
        self,
        endpoint: Endpoint,
        who: str,
        tokens: list[int],
        settings: dict[str, Any],
        read: Callable[[dict[str, Any], str], T],
        longest: int,
    ) -> T:
        """What `read` makes of the single completion that comes back."""

        def single(reply: Reply, who: str) -> T:
            choices = object_of(reply).get("choices")
            if not isinstance(choices, list) or len(choices) != 1:
                raise Broken(f"no single completion is in it, but {shown(repr(choices))}")
            return read(choices[0], who)

        body = {"model": self.name, "prompt": tokens, **settings}
        most = MOST + ENTRY * (len(tokens) + longest)
        return endpoint.about(f"{who} at {self.name}", "/v1/completions", body, single, most)

    def _check_mode(self) -> None:
        """Whether the servers give log-probs of the distribution that tokens are drawn from: seen
        at a temperature.
        """
        if self.processed is None:
            self.processed = True
            for one, probe in zip(self.endpoint.each(), self.probe):
                prompt = probe.sequences[0]
                drawn = self._drawn(
                    one,
                    Request(
                        prompt,
                        {"temperature": HOTTEST, "max_tokens": 8, "seed": 0, "logprobs": 0},
                        probe.names[0],
                    ),
                )
                plain = self._scores(one, prompt + drawn.tokens, len(prompt), probe.names[0])
                self.processed &= max(abs(a - b) for a, b in zip(drawn.logp, plain)) > SAME
        if not self.processed:
            raise UserError(
                "with a temperature, top_p, top_k or min_p the log-probs of the drawing "
                "distribution are recorded too, and this server gives those of the plain softmax: "
                "start it with --logprobs-mode processed_logprobs, or sample plainly "
                "(temperature=1, no cuts)"
            )


# ------------------------------------------------------------------------------------------- asking


def _served(endpoint: Endpoint, wanted: str | None) -> tuple[str, int]:
    """The name of the model and the tokens it reads, of every server the same."""
    names, limits = set(), []
    for one in endpoint.each():
        cards = [
            card
            for card in one.request("GET", "/v1/models", None, cards_of)
            if card.get("parent") is None
        ]
        known = {card["id"]: card for card in cards}
        card = card_of(cards, wanted)
        if wanted is None and card is None:
            raise UserError(
                f"{one.urls[0]} serves {', '.join(known) or 'no model'}: say which samples with "
                "sampler.model=NAME"
            )
        if card is None:
            raise UserError(
                f"{one.urls[0]} does not serve {wanted!r} but {', '.join(known) or 'nothing'}: "
                "start it with the student, or set sampler.model"
            )
        names.add(card["id"])
        limits.append(card.get("max_model_len") or 0)
    if len(names) > 1:
        raise UserError(
            f"the sampling servers serve different models ({', '.join(sorted(names))}): say which "
            "with sampler.model=NAME"
        )
    if not all(limits):
        raise UserError(
            "the sampling server does not say how many tokens it reads (max_model_len in "
            "/v1/models): is it vLLM?"
        )
    return names.pop(), min(limits)


def _ask(endpoint: Endpoint, path: str, body: dict[str, Any], command: str) -> None:
    """A call that changes the server: made once, and explained where it is not understood."""
    try:
        replace(endpoint, retries=0).request("POST", path, body, lambda reply: reply.content)
    except UserError as error:
        raise UserError(
            f"{endpoint.urls[0]} did not take the student's weights over ({error}). It must be "
            f"started as\n  {command}\nwith opdkit installed beside vLLM, and see the folder that "
            "the weights are written to (sampler.shared_folder)"
        ) from error


def _folder(settings: ServerSettings) -> tuple[Any, Path]:
    """Where weights are handed over, and what removes it at the end if it is a temporary one."""
    if settings.shared_folder is not None:
        folder = Path(settings.shared_folder).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return None, folder
    hosts = [urlsplit(url).hostname or "" for url in settings.urls]
    away = [h for h in hosts if h not in ("localhost", "::1") and not h.startswith("127.")]
    if away:
        raise UserError(
            f"the sampling server {away[0]} is another machine, and the student's weights reach it "
            "through files: give a folder that both see under the same path "
            "(sampler.shared_folder=DIR)"
        )
    temporary = tempfile.TemporaryDirectory(prefix="opdkit-weights-")
    return temporary, Path(temporary.name)
