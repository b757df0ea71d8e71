"""A vLLM engine in this process: started so that it takes weights by reference, fed with token ids,
read by token id.
"""

from __future__ import annotations

import os
import random
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError, nearest
from opdkit.base.launched import processes, rank
from opdkit.models.engines.prompt_logprobs import PromptScores, parse_prompt_logprobs
from opdkit.models.engines.weights import DTYPES, save_weights

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has kernels for
OPEN: set[object] = set()  # a mark for each engine of this process
EXTENSION = "opdkit.models.engines.vllm_worker.Weights"


@dataclass(frozen=True)
class EngineSettings:
    """How a vLLM engine is started. Names as in vLLM."""

    dtype: str | None = None  # float32, bfloat16 or float16; null: of the model
    # share of the device's memory (on a CPU: of the machine's) for weights and cache
    gpu_memory_utilization: float = 0.3
    # of the cache alone; null: what gpu_memory_utilization leaves
    kv_cache_memory_bytes: int | None = None
    # tokens of the longest prompt, its response and one more; null: the model's positions
    max_model_len: int | None = None
    max_num_seqs: int = 256  # sequences decoded at once
    max_num_batched_tokens: int | None = None  # of one forward pass; null: vLLM's choice
    tensor_parallel_size: int = 1  # devices that share the weights
    enforce_eager: bool = False  # no compilation and no CUDA graphs: starts faster, samples slower
    enable_prefix_caching: bool = True  # prompts that open alike are read once
    # the engine leaves the GPU's memory to the trainer while it trains
    enable_sleep_mode: bool = False
    # 1: weights wait in the machine's memory; 2: they are dropped, and sent again
    sleep_level: int = 1

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype={self.dtype!r}{nearest(self.dtype, list(DTYPES))} must be one that vLLM "
                f"computes in: {', '.join(DTYPES)}"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0 and at most "
                "1"
            )
        if self.sleep_level not in (1, 2):
            raise ValueError(
                f"sleep_level={self.sleep_level} must be 1 (weights wait in the machine's memory) "
                "or 2 (they are sent again)"
            )
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "tensor_parallel_size",
            "kv_cache_memory_bytes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def _refuse(settings: EngineSettings, cpu: bool) -> None:
    """What an engine in this process cannot do."""
    if settings.enable_sleep_mode and cpu:
        raise UserError(
            "enable_sleep_mode=true frees a GPU's memory while the trainer works; this engine "
            "runs on the CPU, where vLLM has no such mode. Set it to false"
        )
    if torch.distributed.is_initialized() and not OPEN and processes() == 1:
        raise UserError(
            "this process belongs to a training job of several processes that opdkit did not "
            "start, and an engine in it would use their process group: start `vllm serve` beside "
            "the job and sample from it (sampler=server:URL, teacher=server:URL)"
        )
    if processes() > 1 and settings.tensor_parallel_size > 1:
        raise UserError(
            f"tensor_parallel_size={settings.tensor_parallel_size} spreads one engine over several "
            "devices, and in a run of several processes each has an engine on its own: set it to "
            "1, or start `vllm serve` beside the run (sampler=server:URL, teacher=server:URL)"
        )


def _extra(settings: EngineSettings, cpu: bool, lora_rank: int) -> dict[str, Any]:
    """Arguments of vLLM that are given in some cases only."""
    extra: dict[str, Any] = {}
    if lora_rank > RANKS[-1]:
        raise UserError(
            f"adapters of rank {lora_rank} do not fit vLLM, which takes at most "
            f"{RANKS[-1]}: lower lora.r, or set enable_lora=false"
        )
    if lora_rank:
        extra = {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": min(r for r in RANKS if r >= lora_rank),
        }
    for name in ("kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens"):
        if (value := getattr(settings, name)) is not None:
            extra[name] = value
    if processes() > 1:
        # one engine in each of the run's processes, on its device, within their process group
        extra["distributed_executor_backend"] = "external_launcher"
    # there a request with a seed ends the engine (vLLM 0.32) if its prompt is read in parts
    if cpu:
        extra["enable_chunked_prefill"] = False
    return extra


class Engine:
    """vLLM's LLM with what opdkit needs of it.

    The core runs in this process (with one device: the model does too), so weights are handed over
    by reference. Starting it leaves the random generators as they were. `lora_rank` is the rank of
    the adapters it will take, 0 for none.
    """

    def __init__(
        self,
        model: str,
        settings: EngineSettings,
        *,
        dummy: bool = False,  # start with random weights: the real ones are sent
        max_logprobs: int = 1,
        lora_rank: int = 0,
        trust_remote_code: bool = False,
    ):
        vllm = _import()
        from vllm.platforms import current_platform

        self.settings, self.cpu = settings, bool(current_platform.is_cpu())
        _refuse(settings, self.cpu)
        extra = _extra(settings, self.cpu, lora_rank)
        with _starting(), _teaching(model):
            self.llm = vllm.LLM(
                model=model,
                dtype=settings.dtype or _dtype(model, trust_remote_code),
                load_format="dummy" if dummy else "auto",
                gpu_memory_utilization=settings.gpu_memory_utilization,
                max_num_seqs=settings.max_num_seqs,
                tensor_parallel_size=settings.tensor_parallel_size,
                enforce_eager=settings.enforce_eager,
                enable_prefix_caching=settings.enable_prefix_caching,
                enable_sleep_mode=settings.enable_sleep_mode,
                # of drawn tokens; those of prompts are always of the plain softmax
                logprobs_mode="processed_logprobs",
                max_logprobs=max_logprobs,
                generation_config="vllm",  # none of the checkpoint's own sampling settings
                worker_extension_cls=EXTENSION,
                trust_remote_code=trust_remote_code,
                seed=0,
                **extra,
            )
        config = self.llm.llm_engine.model_config
        self.dtype: torch.dtype = config.dtype
        self.limit: int = config.max_model_len
        self.rows: int = config.get_vocab_size()  # of the head
        self.lora: Any = None  # the adapters that requests use
        self.asleep = False
        client, mark = self.llm.llm_engine.engine_core, object()
        # the end of one engine would take the process groups away that all engines of this process
        # share
        client._finalizer.detach()
        OPEN.add(mark)
        self._end = weakref.finalize(self, _end, client.engine_core, mark)

    # ------------------------------------------------------------------------------------- requests

    def run(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[dict[str, Any]],
        tick: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """vLLM's output of each request, in order; `params` are those of `SamplingParams`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        done: dict[int, Any] = {}
        sent: list[str] = []
        try:
            # the trainer's is not the engine's
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                for i, (prompt, given) in enumerate(zip(prompts, params, strict=True)):
                    one = SamplingParams(
                        **given, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
                    )
                    sent.append(
                        engine.add_request(
                            str(i), {"prompt_token_ids": prompt}, one, lora_request=self.lora
                        )
                    )
                while engine.has_unfinished_requests():
                    finished = [output for output in engine.step() if output.finished]
                    done.update({int(output.request_id): output for output in finished})
                    if finished and tick is not None:
                        tick(len(done))
        except BaseException:
            engine.abort_request(sent, internal=True)
            raise
        return [done[i] for i in range(len(prompts))]

    def score(
        self, sequences: Sequence[list[int]], starts: Sequence[int], who: Sequence[str], k: int = 0
    ) -> list[PromptScores]:
        """Log-probs of sequence[start:] under the plain softmax, and the k most probable ids; a
        token is drawn and dropped.

        `who` names each in errors.
        """
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, "detokenize": False}
        outputs = self.run(sequences, [params] * len(sequences))
        return [
            parse_prompt_logprobs(o.prompt_logprobs, s, a, k, w)
            for o, s, a, w in zip(outputs, sequences, starts, who)
        ]

    # -------------------------------------------------------------------------------------- weights

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """New weights by their names in the checkpoint, [...] of any shape: by reference, one after
        the other, or through a folder where other processes hold the model.
        """
        weights = iter(weights)
        if self.settings.tensor_parallel_size == 1:
            self.llm.collective_rpc("opdkit_load", args=(weights,))
            deque(weights, maxlen=0)  # where processes put them together, all go to the end
        else:
            with tempfile.TemporaryDirectory(prefix="opdkit-weights-") as folder:
                save_weights(weights, Path(folder), self.dtype)
                self.llm.collective_rpc("opdkit_load_folder", args=(folder,))
        self.reset()

    def load_adapters(self, folder: Path, version: int) -> None:
        """New adapters, as peft wrote them; requests use them from now on."""
        from vllm.lora.request import LoRARequest

        engine, former = self.llm.llm_engine, self.lora
        adapters = LoRARequest(
            f"student-{version}", (former.lora_int_id if former else 0) + 1, str(folder)
        )
        if not engine.add_lora(adapters):
            raise UserError(
                f"the engine did not take the student's adapters over (optimiser step {version}): "
                "look at its log"
            )
        if former is not None:
            engine.remove_lora(former.lora_int_id)
        self.lora = adapters
        self.reset()

    def reset(self) -> None:
        """Forgets keys and values that older weights computed."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still under way")

    def head(self, rows: int) -> None:
        """Keeps the rows of the head that stand for tokens: only these ids can be drawn or have a
        probability.
        """
        if not all(self.llm.collective_rpc("opdkit_head", args=(rows,))):
            raise UserError(
                "vLLM's class for this model computes logits in a way of its own, so its head "
                "cannot be kept to the tokenizer's real tokens and free of adapters: sample in "
                "this process (sampler=hf), or set enable_lora=false if the head is not padded"
            )

    # ---------------------------------------------------------------------------------------- sleep

    @property
    def dropped(self) -> bool:
        """Whether it sleeps without its weights."""
        return self.asleep and self.settings.sleep_level == 2

    def sleep(self) -> None:
        """Leaves the GPU's memory to others; nothing without `enable_sleep_mode`."""
        if self.settings.enable_sleep_mode and not self.asleep:
            self.llm.sleep(level=self.settings.sleep_level)
            self.asleep = True

    def wake(self, weights: Callable[[], object] | None = None) -> None:
        """Takes its memory again; `weights` sends them before the cache comes back, where they were
        dropped or are new.
        """
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        if weights is not None:
            weights()
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def close(self) -> None:
        """Ends the engine and frees its memory; without it, that is done when the engine is
        collected.
        """
        self._end()


def _end(core: Any, mark: object) -> None:
    OPEN.discard(mark)
    if OPEN or processes() > 1:  # whose process group is the run's own
        core.model_executor.shutdown()
    else:
        core.shutdown()


def _import() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"vLLM cannot be imported ({error}): install it beside opdkit, `pip install vllm` for "
            "a GPU or `make install-vllm` for a CPU, or use the engine of this process "
            "(sampler=hf, teacher=MODEL)"
        ) from error
    return vllm


def _dtype(model: str, trust_remote_code: bool) -> str:
    """Of the checkpoint. vLLM's own choice would compute a float32 checkpoint in 16 bits."""
    from transformers import AutoConfig

    dtype = (
        AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        .get_text_config()
        .dtype
    )
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


@contextmanager
def _starting() -> Iterator[None]:
    """vLLM seeds every generator when it starts in this process, and on a CPU forbids to change
    torch's threads: both are put back.
    """
    import numpy as np

    told = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if processes() > 1:  # the device that this process is on, whoever started it
        usual = os.environ.get("LOCAL_RANK", rank())
        here = torch.cuda.current_device() if torch.cuda.is_available() else usual
        told["LOCAL_RANK"] = str(here)
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    states, threads = (random.getstate(), np.random.get_state()), torch.set_num_threads
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads = threads
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def _teaching(model: str) -> Iterator[None]:
    """What vLLM raises for settings that do not fit this machine or model."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:600]
        raise UserError(
            f"vLLM cannot start {model!r}: {reason}\nIf memory is short, change "
            "gpu_memory_utilization or kv_cache_memory_bytes, or lower max_model_len or "
            "max_num_seqs"
        ) from error
