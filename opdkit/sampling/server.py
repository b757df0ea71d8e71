"""The sampler that asks one `vllm serve` or several: token ids over HTTP, and after every optimiser
step the student's weights through a shared folder.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opdkit.base.errors import UserError
from opdkit.base.launched import rank
from opdkit.models.engines.endpoint import Endpoint, Gone
from opdkit.models.engines.exchange import addresses
from opdkit.models.engines.probe import Probe
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
from opdkit.sampling.completions import drawn, scores
from opdkit.sampling.respond import (
    HOTTEST,
    Drawn,
    EngineSampler,
    Request,
    head_now,
    padded,
    real_rows,
    shape_of,
)
from opdkit.sampling.servers import Push, Server, Servers
from opdkit.sampling.settings import SamplerContext, SamplerSettings, Sizes
from opdkit.types import Sampler, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME = 0.1  # nats: two log-probs of one token, drawn at temperature 2, are of the same distribution


@dataclass(frozen=True)
class ServerSettings(SamplerSettings):
    """Which servers sample, and how the student's weights reach them.

    The servers are started by hand: with `servers.COMMAND`, or `ADAPTERS` for enable_lora; on a
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
        self.dtype = DTYPES[engine_dtype(model, settings.dtype)]
        self.run = uuid.uuid4().hex[:8]  # a server may know adapters of an earlier run
        # optimiser steps of the weights in the servers; None: none were sent yet
        self.version: int | None = None
        self.unsent: Push | None = None  # what no server took over
        probe = partial(Probe, model, tokenizer, head, self.dtype)
        self.asks = rank() == 0  # of several processes the first alone
        if not self.asks:
            self.probe = probe()
            return
        self._files, self.folder = _folder(settings)
        endpoint = Endpoint(
            settings.urls,
            settings.concurrency,
            settings.timeout,
            settings.retries,
            settings.api_key_env,
            "the sampling server",
            rest=math.inf,
        )
        self.servers = Servers(endpoint, settings.model)
        self.limit = self.servers.limit
        self.probe = probe(self.limit, settings.sync_tolerance)
        for server in self.servers.all:
            server.probe = probe(self.limit, settings.sync_tolerance)

    # ----------------------------------------------------------------------------------------- sync

    def sync(self, model: CausalLM, version: int) -> None:
        """After an optimiser step: every server takes the student's weights over, forgets what
        older ones computed, and is probed.
        """
        self.staged(model, version)()

    def staged(self, model: CausalLM, version: int) -> Callable[[], None]:
        """The first half of `sync`: the weights as files, and what the probe expects of them.

        Of several processes all put the weights together, layer by layer, and the first keeps them.
        """
        check_model(self.model, model)
        name = f"student-{self.run}-{version}"
        folder = self.folder / name if self.asks else None
        if self.settings.enable_lora:
            save_adapters(self.model, folder)
        else:
            save_weights(checkpoint_weights(self.model), folder, self.dtype)
        expected = self.probe.expected()
        if folder is None:
            return lambda: None
        special = padded(self.head) or self.settings.enable_lora
        rows = real_rows(self.head) if special else None
        adapters = name if self.settings.enable_lora else None
        return partial(self._send, Push(version, folder, expected, adapters, rows))

    def _send(self, push: Push) -> None:
        """The second half. Where no server is left but there was one, this shows when the next
        rollouts are asked for: until then what was learnt can be saved.
        """
        self._forget()
        self.unsent = push
        try:
            self.servers.push(push)
        except Gone:
            if self.version is None:
                self._forget()
                raise
        except BaseException:
            self._forget()
            raise
        else:
            self._forget()
        self.version = push.version

    def _forget(self) -> None:
        """Removes the files of weights that are not sent again."""
        if self.unsent is not None:
            shutil.rmtree(self.unsent.folder, ignore_errors=True)
            self.unsent = None

    # --------------------------------------------------------------------------------------- sample

    @property
    def behind(self) -> bool:
        return self.version is None

    def ready(self, sampling: Sampling, policy_version: int) -> None:
        if not self.asks:
            raise RuntimeError("of several processes the first asks the servers, and not this one")
        if self.unsent is not None:
            try:
                self.servers.push(self.unsent)
            finally:
                self._forget()
        if not sampling.plain and sampling.temperature > 0:
            self._check_mode()

    def draw(self, requests: Sequence[Request], tick: Callable[[int], None] | None) -> list[Drawn]:
        """A continuation of each."""
        name, rows = self.servers.name, real_rows(self.head)
        return self.servers.ask(
            [partial(drawn, name=name, request=request, rows=rows) for request in requests], tick
        )

    def score(
        self, sequences: Sequence[list[int]], starts: Sequence[int], who: Sequence[str]
    ) -> list[list[float]]:
        """Log-probs of sequence[start:] under the plain softmax."""
        name = self.servers.name
        return self.servers.ask(
            [
                partial(scores, name=name, tokens=tokens, start=start, who=one)
                for tokens, start, one in zip(sequences, starts, who)
            ]
        )

    def metrics(self) -> dict[str, float]:
        """How many servers take part."""
        return {"sampler/servers": float(len(self.servers.in_use))} if self.asks else {}

    def _check_mode(self) -> None:
        """Whether the servers give log-probs of the distribution that tokens are drawn from: seen
        at a temperature. One that is back and does not is left out.
        """
        servers = self.servers
        for server in servers.in_use:
            if server.processed is None:
                servers.tried(server, partial(self._see_mode, server))
        wrong = [server for server in servers.in_use if server.processed is False]
        advice = (
            "with a temperature, top_p, top_k or min_p the log-probs of the drawing distribution "
            "are recorded too, and this server gives those of the plain softmax: start it with "
            "--logprobs-mode processed_logprobs, or sample plainly (temperature=1, no cuts)"
        )
        if any(server.new for server in wrong) or (wrong and len(wrong) == len(servers.in_use)):
            raise UserError(advice)
        for server in wrong:
            servers.leave_out(server, advice)

    def _see_mode(self, server: Server) -> None:
        prompt, who = self.probe.sequences[0], self.probe.names[0]
        settings = {"temperature": HOTTEST, "max_tokens": 8, "seed": 0, "logprobs": 0}
        made = drawn(server.one, server.name, Request(prompt, settings, who), real_rows(self.head))
        plain = scores(server.one, server.name, prompt + made.tokens, len(prompt), who)
        server.processed = max(abs(a - b) for a, b in zip(made.logp, plain)) > SAME


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
