"""Real vLLM on a CPU: a student of a million weights, questions as in GSM8K, engines in this
process and servers beside it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opdkit.sampling.vllm import VllmSettings
from tests.common.tiny import tiny_model, tiny_tokenizer

DATA = Path(__file__).parents[2] / "../shared/data/gsm8k_train.jsonl"
WRITTEN = (
    "Tom has 3 apples and buys 4 more. How many apples does Tom have?",
    "A book costs $12 and a pen costs $3. How much do 2 books and 5 pens cost?",
    "Ann earns $15 an hour. Yesterday she worked for 40 minutes. How much did she earn?",
    "There are 24 children in a class, and a third of them play chess. How many do not?",
    "A train goes 60 miles in an hour. How far does it go in 2 hours and 30 minutes?",
    "Ben read 12 pages on Monday and twice as many on Tuesday. How many pages did he read?",
    "A box holds 6 eggs. How many boxes are needed for 50 eggs?",
    "Sue had 48 stamps and gave half of them away. How many are left?",
)
ROWS = 352  # of the head; the tokenizer has 320 tokens, so 32 of them only pad it
SMALL = {
    "max_model_len": 384,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
}
SETTINGS = VllmSettings(**SMALL)


def questions() -> list[str]:
    """Eight short questions, of GSM8K where it is at hand."""
    if not DATA.exists():
        return list(WRITTEN)
    texts = (json.loads(line)["question"] for line in DATA.read_text(encoding="utf-8").splitlines())
    return [text for text in texts if len(text) < 120][:8]


def build(seed: int = 0, tied: bool = True, rows: int = ROWS) -> Any:
    """A Qwen3 of 1.3 million weights."""
    return tiny_model(vocab_size=rows, hidden=256, seed=seed, spread=0.06, tie_word_embeddings=tied)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    pytest.importorskip("vllm")
    return tiny_tokenizer([*WRITTEN, *questions()])


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a model, by its seed and the rows of its head."""

    def save(seed: int, rows: int = ROWS) -> str:
        folder = tmp_path_factory.getbasetemp() / f"model-{seed}-{rows}"
        if not folder.exists():
            tokenizer.save_pretrained(folder)
            build(seed, rows=rows).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text(
        "".join(json.dumps({"question": q, "answer": "42"}) + "\n" for q in questions()),
        encoding="utf-8",
    )
    return str(path)


@pytest.fixture(scope="session")
def running() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Servers by their URL, ended when the tests are."""
    started: dict[str, subprocess.Popen[str]] = {}
    yield started
    for process in started.values():
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="session")
def serve(tokenizer: Any, running: dict[str, subprocess.Popen[str]]) -> Callable[..., str]:
    """Starts vLLM's server on a model; the URL."""

    def start(model: str, *options: str, port: int = 0) -> str:
        if not port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        sizes = [
            x
            for name, value in SMALL.items()
            if name != "enforce_eager"
            for x in (f"--{name.replace('_', '-')}", str(value))
        ]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            model,
            "--served-model-name",
            "tiny",
        ]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--enforce-eager",
            *sizes,
            *options,
        ]
        command += ["--no-enable-chunked-prefill"]  # as `Engine` has it on a CPU
        allowed = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        process = subprocess.Popen(
            command,
            env=os.environ | allowed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running[f"http://127.0.0.1:{port}"] = process
        assert process.stdout is not None
        last: deque[str] = deque(maxlen=40)
        for line in process.stdout:
            last.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("the server did not start:\n" + "".join(last))
        # a full pipe would stop the server
        threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()
        return f"http://127.0.0.1:{port}"

    return start


# of a server that is sent the student's weights, and starts with random ones
FOLLOWS = (
    *("--worker-extension-cls", "opdkit.models.engines.vllm_worker.Weights"),
    *("--load-format", "dummy", "--logprobs-mode", "processed_logprobs"),
)


@pytest.fixture(scope="session")
def server(serve: Callable[..., str], checkpoint: Callable[..., str]) -> str:
    """A server with random weights, as one that is sent the student's is started."""
    return serve(checkpoint(0), *FOLLOWS, "--enable-lora", "--max-lora-rank", "8")
