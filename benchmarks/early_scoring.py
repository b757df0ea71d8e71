"""A step whose rollouts are scored as each ends, beside one that scores them once all are written.

The student is sampled here; its teacher is a stand-in for a server in vLLM's form, in a process of
its own, which takes as many seconds as it is told for each token that it reads, one request after
the other, and needs no processor for it: a teacher on another device. How fast it is, is told as a
share: the seconds in which it reads a step's tokens, of those in which the student writes them. A
step costs at least 1 (writing), and at most 1 + share.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import (
    alternate,
    begin,
    parser,
    questions,
    qwen3,
    ratios,
    save,
    spread,
    stopping,
    table,
    text,
    tokenizer,
)

SHARES = (0.25, 0.5, 1.0)
SIDES = ("in the step", "as each ends")


# -------------------------------------------------------------------------------------- the teacher


class Handler(BaseHTTPRequestHandler):
    """Every token has log-prob -1; what is not about a rollout takes no time."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    rate = 1e9  # tokens a second
    one = threading.Lock()

    def do_GET(self) -> None:
        card = {"id": "stand-in", "object": "model", "owned_by": "vllm", "max_model_len": 1 << 16}
        self.write({"object": "list", "data": [card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/rate":
            type(self).rate = body["rate"]
            return self.write({})
        entries: list[Any] = [{str(t): {"logprob": -1.0}} for t in body["prompt"]]
        with self.one:
            time.sleep(len(entries) / self.rate)
        entries[0] = None
        choice = {"index": 0, "text": "", "prompt_logprobs": entries}
        return self.write({"model": "stand-in", "choices": [choice]})

    def write(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def serve(port: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    port.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def teacher() -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def set_rate(url: str, rate: float) -> None:
    from opdkit.models.engines.endpoint import Endpoint

    Endpoint([url]).post("/rate", {"rate": rate})


# --------------------------------------------------------------------------------------------- runs


class Steps:
    """A run of opd, one step at a time."""

    def __init__(self, args: argparse.Namespace, folder: Path, url: str, early: bool):
        from opdkit.run.build import prepare
        from opdkit.run.open import Given
        from opdkit.run.settings import make_run

        torch.manual_seed(args.seed)
        with torch.device(args.device):
            model = stopping(qwen3(args.hidden, args.layers, 320, initial=0.08), 1 / args.mean)
        run = make_run(
            {
                "student": "student",
                "teacher": {"kind": "server", "urls": [url], "early": early},
                "data": "in memory",
                "method": "opd",
                "output": str(folder),
                "steps": 10**6,
                "prompts_per_step": args.rollouts,
                "sampling": {"num_generations": 1, "max_completion_length": args.length},
                "optim": {"learning_rate": 1e-9},  # both sides write the same lengths
                "device": args.device,
                "keep_samples": 0,
                "seed": args.seed,
            }
        )
        run.folder.mkdir(parents=True)
        texts = questions(args.rollouts, 320, args.seed)
        rows = [{"id": str(i), "prompt": words} for i, words in enumerate(texts)]
        given = Given(student=model, tokenizer=tokenizer(320), rows=rows)
        with contextlib.redirect_stdout(io.StringIO()):
            self.job, self.state = prepare(run, given)
        self.lines: list[Mapping[str, float]] = []
        self.job.recorder.show = lambda step, metrics: self.lines.append(dict(metrics))

    def take(self) -> dict[str, float]:
        """Seconds of a step until it learns: of writing and of what scoring took beyond."""
        from opdkit.train.loop import train_step

        before = self.state.tokens
        train_step(self.job, self.state)
        last = self.lines[-1]
        sample, score = last["seconds/sample"], last["seconds/score"]
        tokens = float(self.state.tokens - before)
        return {"sample": sample, "score": score, "both": sample + score, "tokens": tokens}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per share."""
    found = []
    with tempfile.TemporaryDirectory() as folder, teacher() as url:
        late, early = (Steps(args, Path(folder) / str(e), url, e) for e in (False, True))
        set_rate(url, 1e9)
        plain = [late.take() for _ in range(3)][1:]
        speed = sum(p["tokens"] for p in plain) / sum(p["sample"] for p in plain)
        for share in args.shares:
            set_rate(url, speed / share)
            sides = alternate(dict(zip(SIDES, (late.take, early.take))), args.pairs)
            both = {name: [step["both"] for step in steps] for name, steps in sides.items()}
            score = {name: [step["score"] for step in steps] for name, steps in sides.items()}
            found.append(
                {
                    "share": share,
                    "seconds": {name: spread(values) for name, values in both.items()},
                    "score": {name: spread(values) for name, values in score.items()},
                    "ratio": ratios(both[SIDES[1]], both[SIDES[0]]),
                    "tokens": sides[SIDES[0]][0]["tokens"],
                }
            )
    return found


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--hidden", type=int, default=64)
    made.add_argument("--layers", type=int, default=2)
    made.add_argument("--rollouts", type=int, default=32)
    made.add_argument("--length", type=int, default=256, help="tokens of a response, at most")
    made.add_argument(
        "--mean", type=float, default=96.0, help="tokens after which one in e goes on"
    )
    made.add_argument("--pairs", type=int, default=7)
    made.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    return made


def main(arguments: list[str] | None = None) -> None:
    args = options().parse_args(arguments)
    begin(args)
    found = measure(args)
    table(
        ["scoring / writing", "step, scored after", "scored as each ends", "ratio of the pairs"],
        [
            [f"{line['share']:g}", *(text(line["seconds"][s]) for s in SIDES), text(line["ratio"])]
            for line in found
        ],
    )
    save("early_scoring", args, {"shares": found})


if __name__ == "__main__":
    main()
