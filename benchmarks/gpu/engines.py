"""vLLM as the sampler: an engine in this process, and servers that weights are pushed to while they
write ahead.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from ranks import MOST, exact
from runs import done, run_of, same
from setting import Check, Figures, Setting, Skip, must

SHARE = 0.25  # of a GPU's memory that an engine takes beside the trainer
START = 150.0  # seconds that a server may take to start
CLOSE = 0.05  # nats: mean distance of an engine's log-probs from the trainer's, in bfloat16


def _installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed: pip install vllm")


def _judged(lines: list[Any]) -> Figures:
    """What vLLM wrote is what the trainer would have written, after every update."""
    apart = [line["sampling/mismatch"] for line in lines]
    must(max(apart) < CLOSE, f"log-probs are {max(apart):.3f} nats from the trainer's")
    return {
        "mismatch, nats": max(apart),
        "tokens/s, sample": lines[-1].get("tokens_per_second/sample", 0.0),
    }


def engine(setting: Setting) -> Figures:
    """An engine in this process, which takes over the weights after every step."""
    _installed()
    sampler: dict[str, Any] = {"kind": "vllm", "max_model_len": 1024}
    small = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
    sampler |= {"gpu_memory_utilization": SHARE} if setting.gpu else small
    return _judged(done(run_of(setting, "engine", sampler=sampler, steps=3)))


@contextlib.contextmanager
def _server(setting: Setting) -> Iterator[str]:
    """A server with random weights, on the last GPU; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", setting.model("student"), "--served-model-name", "student"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
    command += ["--worker-extension-cls", "opdkit.models.engines.vllm_worker.Weights"]
    command += ["--load-format", "dummy", "--logprobs-mode", "processed_logprobs"]
    small = ["--kv-cache-memory-bytes", str(64 << 20), "--no-enable-chunked-prefill"]
    small += ["--enforce-eager", "--dtype", "float32"]
    command += ["--gpu-memory-utilization", str(SHARE)] if setting.gpu else small
    told = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if setting.gpu:
        told["CUDA_VISIBLE_DEVICES"] = str(setting.gpus - 1)
    log = setting.folder / f"server-{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | told, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        _until_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    except RuntimeError as error:
        raise RuntimeError(f"{error}:\n{log.read_text()[-1500:]}") from None
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        process.kill()


def _until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        time.sleep(0.5)
    raise RuntimeError("the vLLM server did not start")


def push(setting: Setting) -> Figures:
    """A server that starts with random weights: pushed to, and asked one step ahead."""
    _installed()
    with _server(setting) as url:
        values = run_of(setting, "push", sampler=f"server:{url}", steps=5, ahead=1)
        lines = done(values)
    lags = [line.get("lag/steps", 0.0) for line in lines]
    must(lags == [0.0, 1.0, 1.0, 1.0, 1.0], f"lags {lags}, not 0, 1, 1, 1, 1")
    rest = lines[1:]
    waited = sum(line["seconds/wait"] for line in rest) / sum(x["seconds/step"] for x in rest)
    return {**_judged(lines), "share of waiting": waited}


def ray(setting: Setting) -> Figures:
    """A trainer and a sampler placed by Ray, each with a GPU of its own: what one process finds."""
    if importlib.util.find_spec("ray") is None:
        raise Skip("Ray is not installed: pip install 'opdkit[ray]'")
    if setting.gpu and setting.gpus < 2:
        raise Skip(f"needs 2 GPUs, here is {setting.gpus}")
    alone = done(exact(setting, "ray-alone"))
    placed = done(exact(setting, "ray", cluster={"kind": "ray", "trainers": 1, "samplers": 1}))
    own = ("sampler/", "cluster/")  # of who is there
    shown = [{n: x for n, x in line.items() if not n.startswith(own)} for line in placed]
    apart = same(alone, shown)
    must(apart <= MOST, f"metrics are {apart:g} apart")
    late = exact(setting, "ray-ahead", cluster="ray", ahead=1, steps=4)
    lags = [line.get("lag/steps", 0.0) for line in done(late)]
    must(lags == [0.0, 1.0, 1.0, 1.0], f"lags {lags}, not 0, 1, 1, 1")
    return {"metrics apart": apart}


CHECKS = (
    Check("Ray", "a trainer and a sampler as actors", 150, ray),
    Check("vLLM engine", "in this process, weights after every step", 120, engine),
    Check("vLLM server", "weights pushed, rollouts one step ahead", 180, push),
)
