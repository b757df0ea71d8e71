"""The sampler that runs vLLM in this process: the student's weights follow every optimiser step,
and a probe makes sure that they do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opdkit.models.adapters import has_adapters
from opdkit.models.engines.probe import Probe
from opdkit.models.engines.vllm_engine import Engine, EngineSettings
from opdkit.models.engines.weights import (
    adapter_rank,
    checkpoint_weights,
    engine_dtype,
    save_adapters,
)
from opdkit.models.held import Held
from opdkit.models.load import CausalLM
from opdkit.objective.head import Head
from opdkit.sampling.check import check_model
from opdkit.sampling.respond import (
    Drawn,
    EngineSampler,
    Request,
    ended,
    head_now,
    padded,
    real_rows,
    shape_of,
)
from opdkit.sampling.settings import Pace, Room, SamplerContext, SamplerSettings, Sizes
from opdkit.types import Sampler, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class VllmSettings(EngineSettings, SamplerSettings):
    """How the sampling engine is started, and how it follows the student."""

    kind = "vllm"
    # of a student with adapters send these alone; else the weights with the adapters added to them
    enable_lora: bool = False
    # nats, between engine and trainer (see `probe`); null: by dtype
    sync_tolerance: float | None = None

    def open(self, context: SamplerContext) -> Sampler:
        settings = replace(
            self,
            # of the products, whatever the weights that learn are kept in
            dtype=self.dtype or ("bfloat16" if context.products == "bfloat16" else None),
            # vLLM reserves for all the model's positions otherwise
            max_model_len=self.max_model_len or context.longest + 1,
        )
        return VllmSampler(
            context.model,
            context.tokenizer,
            settings,
            head=context.head_now,
            trust_remote_code=context.trust_remote_code,
            known=context.known,
        )

    def room(self, sizes: Sizes) -> Room:
        shape, width = sizes.student.shaped, self._width(sizes.student, sizes.products)
        weights = shape.parameters * width
        whole = self.gpu_memory_utilization * sizes.memory
        size = whole if self.kv_cache_memory_bytes is None else weights + self.kv_cache_memory_bytes
        token = 2 * shape.layers * shape.keys * width
        fitting = int(max(0, size - weights)) // (token * sizes.longest)
        rows = max(1, min(sizes.rollouts, self.max_num_seqs, fitting))
        asleep = self.enable_sleep_mode
        return Room("sampler's vLLM engine", max(size, weights), rows, always=not asleep)

    def pace(self, student: Held, products: str, launch: float, graph: float) -> Pace:
        width, shape = self._width(student, products), student.shaped
        return Pace(width, 2 * shape.layers * shape.keys * width, graph)

    def _width(self, student: Held, products: str) -> int:
        """Bytes of a number in the engine, which computes as `open` says."""
        usual = "bfloat16" if products == "bfloat16" else student.dtype
        return 4 if (self.dtype or usual) == "float32" else 2

    def lighter(self) -> Iterator[tuple[str, SamplerSettings]]:
        if not self.enable_sleep_mode:
            yield "sampler.enable_sleep_mode=true", replace(self, enable_sleep_mode=True)


class VllmSampler(EngineSampler):
    """Samples with a vLLM engine from the weights of `model`, a Hugging Face model that trains in
    this process.

    The engine starts with random weights and takes the student's before the first rollout: were
    some of them left behind, the first probe would show it. `sync` sends them again after an
    optimiser step. Draws are keyed by seed and rollout id; as batches of other shapes round
    differently, a rollout is the same in other company up to near ties.

    Both log-probs are exact. Of tokens drawn from the plain softmax they are vLLM's own; with
    temperature or cuts it gives those of the drawing distribution, and the plain ones are read off
    a second pass over the finished responses.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        settings: VllmSettings = VllmSettings(),
        *,
        head: Callable[[], Head] | None = None,
        trust_remote_code: bool = False,
        known: Callable[[], Tensor | None] = lambda: None,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        head = head or head_now(model, tokenizer)
        self.head = shape_of(head())
        self._files = tempfile.TemporaryDirectory(prefix="opdkit-vllm-")
        self.engine = Engine(
            write_configuration(model, tokenizer, Path(self._files.name) / "model"),
            replace(settings, dtype=engine_dtype(model, settings.dtype)),
            dummy=True,
            lora_rank=adapter_rank(model) if settings.enable_lora else 0,
            trust_remote_code=trust_remote_code,
        )
        if padded(self.head) or settings.enable_lora:
            self.engine.head(real_rows(self.head))
        self.probe = Probe(
            model,
            tokenizer,
            head,
            self.engine.dtype,
            self.engine.limit,
            settings.sync_tolerance,
            known,
        )
        self.limit = self.engine.limit
        # optimiser steps of the weights in the engine; None: none were sent yet
        self.version: int | None = None

    def sync(self, model: CausalLM, version: int) -> None:
        """After an optimiser step: the engine takes the student's weights over, forgets what older
        ones computed, and is probed.
        """
        check_model(self.model, model)
        self.engine.wake(partial(self._send, version))
        scored = self.engine.score(
            self.probe.sequences, [1] * len(self.probe.sequences), self.probe.names
        )
        self.probe.check(
            [s.logp for s in scored],
            self.probe.expected(),
            version,
            "sending adapters" if self.settings.enable_lora else "sending weights",
        )
        self.version = version

    def _send(self, version: int) -> None:
        """The weights, or the adapters and once the weights below them."""
        if not self.settings.enable_lora:
            self.engine.load(checkpoint_weights(self.model))
            return
        if self.version is None or self.engine.dropped:
            self.engine.load(checkpoint_weights(self.model, merged=False))
        with tempfile.TemporaryDirectory(dir=self._files.name) as folder:
            save_adapters(self.model, Path(folder))
            self.engine.load_adapters(Path(folder), version)

    @property
    def behind(self) -> bool:
        return self.version is None or self.engine.dropped

    def ready(self, sampling: Sampling, policy_version: int) -> None:
        self.engine.wake()

    def rest(self) -> None:
        self.engine.sleep()

    def draw(self, requests: Sequence[Request], tick: Callable[[int], None] | None) -> list[Drawn]:
        """A continuation of each."""
        params = [
            request.settings | {"detokenize": bool(request.settings["stop"])}
            for request in requests
        ]
        outputs = [
            output.outputs[0]
            for output in self.engine.run([r.tokens for r in requests], params, tick)
        ]
        return [
            Drawn(list(o.token_ids), list(o.logprobs.logprobs), ended(o.finish_reason))
            for o in outputs
        ]

    def score(
        self, sequences: Sequence[list[int]], starts: Sequence[int], who: Sequence[str]
    ) -> list[list[float]]:
        """Log-probs of sequence[start:] under the plain softmax."""
        return [scored.logp.tolist() for scored in self.engine.score(sequences, starts, who)]

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        self.engine.close()
        self._files.cleanup()


def write_configuration(model: CausalLM, tokenizer: Any, folder: Path) -> str:
    """A checkpoint without weights, from which an engine learns the architecture."""
    base = model.get_base_model() if has_adapters(model) else model
    if not base.config.architectures:
        base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
