"""What the benchmarks share: alternation, spreads, tables, result files, peak memory, and models
with natural stop lengths.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]

PAD, EOS = 0, 1
T = TypeVar("T")


# ---------------------------------------------------------------------------------------- comparing


def alternate(
    sides: Mapping[str, Callable[[], T]], pairs: int, warmup: int = 1
) -> dict[str, list[T]]:
    """Runs the sides in turn, A B A B ..., after `warmup` rounds that are thrown away; one result
    per side and round.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(warmup + pairs):
        for name, run in sides.items():
            result = run()
            if number >= warmup:
                results[name].append(result)
    return results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    ordered = sorted(values)
    quartiles = (
        statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    )
    return {
        "median": statistics.median(ordered),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "min": ordered[0],
        "max": ordered[-1],
        "n": len(ordered),
    }


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios of the pairs."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def text(of: Mapping[str, float], digits: int = 2) -> str:
    """`median [q1, q3]`."""
    return f"{of['median']:.{digits}f} [{of['q1']:.{digits}f}, {of['q3']:.{digits}f}]"


# ---------------------------------------------------------------------------------------- reporting


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument(
        "--threads", type=int, help="CPU threads of torch; default: as torch chooses"
    )
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--out", type=Path, default=ROOT / "results", help="folder of the JSON result"
    )
    return options


def begin(args: argparse.Namespace) -> None:
    """Threads and seed, before anything is made."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def synchronize(device: str) -> None:
    """Waits for the accelerator, so that a clock read afterwards is right."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints aligned columns."""
    lines = [
        [str(c) for c in columns],
        *([f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for number, line in enumerate(lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def save(name: str, args: argparse.Namespace, result: Mapping[str, Any]) -> dict[str, Any]:
    """Writes OUT/name.json: the settings, the machine and the numbers."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "worker")}
    whole = {"benchmark": name, "settings": settings, "machine": machine(args.device), **result}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for package in ("torch", "transformers", "trl", "liger-kernel", "vllm", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (
                line.split(":", 1)[1].strip()
                for line in info.read_text().splitlines()
                if "model name" in line
            ),
            cpu,
        )
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "versions": versions,
    }


# ------------------------------------------------------------------------------------------- memory


def peak_memory(device: str) -> int:
    """Bytes at the peak so far: allocated on the GPU, else resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    # on Linux ru_maxrss starts from the peak of the process that started this one
    if status.exists():
        return next(
            1024 * int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def apart(script: str, task: Mapping[str, Any], args: argparse.Namespace) -> Any:
    """What the script's worker says of a task in a process of its own: a process has only one peak
    of memory.
    """
    command = [
        sys.executable,
        script,
        "--worker",
        json.dumps(task),
        "--device",
        args.device,
        "--seed",
        str(args.seed),
    ]
    command += ["--threads", str(args.threads)] if args.threads else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the worker for {task} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------------- models


def qwen3(
    hidden: int,
    layers: int,
    vocab: int,
    *,
    inner: int | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    initial: float = 0.02,
) -> Any:
    """An untrained Qwen3 with tied embeddings, in float32 on the default device; `initial` is the
    deviation of its weights.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner or 3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        initializer_range=initial,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return Qwen3ForCausalLM(config).eval()


def stopping(model: Any, probability: float) -> Any:
    """The model with a bias on its head that makes every token the last one with this probability,
    whatever stands before it (0: never).

    Response lengths are then geometric, as in natural text: mean 1 / probability, cut at the limit.
    """
    old = model.get_output_embeddings()
    vocab, hidden = old.weight.shape
    head = nn.Linear(hidden, vocab, bias=True, device="meta")
    head.weight = old.weight
    head.bias = nn.Parameter(old.weight.new_zeros(vocab))
    with torch.no_grad():
        head.weight[EOS] = 0.0  # the bias alone is its logit
        model.set_output_embeddings(head)
        sample = torch.randint(EOS + 1, vocab, (4, 32), device=old.weight.device)
        logits = model(sample, use_cache=False).logits.float()
        logits[..., EOS] = -math.inf
        others = float(logits.logsumexp(-1).mean())
        head.bias[EOS] = others + math.log(probability / (1 - probability)) if probability else -1e4
    return model


def tokenizer(vocab: int) -> Any:
    """One token per word `w2` ... `w{vocab - 1}`; pads on the left, as generation wants it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, vocab)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def questions(n: int, vocab: int, seed: int, shortest: int = 16, longest: int = 32) -> list[str]:
    """n prompts of random words, of different lengths in tokens."""
    rng = random.Random(seed)
    return [
        " ".join(f"w{rng.randrange(2, vocab)}" for _ in range(rng.randint(shortest, longest)))
        for _ in range(n)
    ]
