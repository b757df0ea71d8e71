"""What every check of a machine's GPUs is given: the device, sizes, a folder with models and rows,
and the words in which it fails or is left out.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import EOS, PAD, qwen3, tokenizer
from torch import nn

Figures = dict[str, Any]


class Skip(Exception):
    """A check that cannot be done here, and why."""


class Wrong(AssertionError):
    """A check whose result is not what it must be."""


def must(holds: bool, what: str) -> None:
    """Fails unless something holds."""
    if not holds:
        raise Wrong(what)


@dataclass(frozen=True)
class Setting:
    """Where checks run, and how large."""

    device: str
    small: bool  # seconds on a CPU
    gpus: int
    folder: Path
    seed: int = 0

    @property
    def vocabulary(self) -> int:
        return 320 if self.small else 151936

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.gpu else "float32"

    def need_gpu(self, why: str) -> None:
        if not self.gpu:
            raise Skip(f"needs a GPU: {why}")

    def model(self, name: str) -> str:
        """The folder of a checkpoint with random weights: `student` and `teacher` (the shapes of
        Qwen3-0.6B and 1.7B; tiny ones where all is small), and for runs in float64 `tiny-student`,
        `tiny-teacher`, `tiny-untied`, whose head is not its embedding, and `tiny-experts`, a
        mixture of four.
        """
        path = self.folder / "models" / name
        if not path.exists():
            made = path.with_suffix(".part")
            shutil.rmtree(made, ignore_errors=True)
            torch.manual_seed(self.seed + len(name))
            model = _build(name, self.small)
            model.save_pretrained(made)
            tokenizer(model.config.vocab_size).save_pretrained(made)
            made.rename(path)
        return str(path)

    def rows(self, name: str, count: int, vocabulary: int) -> str:
        """A file of prompts of random words, some of them much longer than others."""
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            rng = random.Random(self.seed)
            most = 12 if self.small else 96
            texts = [
                " ".join(f"w{rng.randrange(2, vocabulary)}" for _ in range(rng.randint(3, most)))
                for _ in range(count)
            ]
            lines = [json.dumps({"id": str(i), "prompt": text}) for i, text in enumerate(texts)]
            path.write_text("\n".join(lines) + "\n")
        return str(path)

    def clean(self) -> None:
        """Between two checks: what the first held is free, and peaks begin anew."""
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _build(name: str, small: bool) -> Any:
    if name.startswith("tiny"):
        if name == "tiny-experts":
            return _experts()
        model = qwen3(48 if name == "tiny-teacher" else 32, 2, 320, kv_heads=2, initial=0.2)
        if name == "tiny-untied":
            model.config.tie_word_embeddings = False
            model.lm_head.weight = nn.Parameter(0.2 * torch.randn(320, 32))
        return model
    if small:
        # heads of 64 numbers, for vLLM on a CPU
        wide = 64 if name == "teacher" else 32
        return qwen3(wide, 2, 320, kv_heads=2, head_dim=64, initial=0.2)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        hidden, inner = (2048, 6144) if name == "teacher" else (1024, 3072)
        model = qwen3(
            hidden, 28, 151936, inner=inner, heads=16, kv_heads=8, head_dim=128, initial=0.02
        )
    return model.bfloat16()


def _experts() -> Any:
    """A mixture of four experts, of which each token meets two."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return Qwen3MoeForCausalLM(config).eval()


@dataclass(frozen=True)
class Check:
    """One thing that is tried: what it is, how long it may take, and what does it."""

    name: str
    about: str
    seconds: float  # at most; on a GPU
    run: Callable[[Setting], Figures]


@dataclass
class Outcome:
    """How a check ended."""

    name: str
    result: str  # pass, fail or skip
    seconds: float
    reason: str = ""
    figures: Figures = field(default_factory=dict)


def outcome(check: Check, setting: Setting) -> Outcome:
    """Does a check; whatever goes wrong in it is its result."""
    setting.clean()
    start = time.monotonic()

    def ended(result: str, reason: str = "", figures: Figures | None = None) -> Outcome:
        return Outcome(check.name, result, time.monotonic() - start, reason, figures or {})

    try:
        return ended("pass", figures=check.run(setting))
    except Skip as why:
        return ended("skip", str(why))
    except Exception as error:
        return ended("fail", f"{type(error).__name__}: {error}"[:2000])


assert (PAD, EOS) == (0, 1)  # the ids of `tokenizer`
