"""`opdkit serve-teacher`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdkit.base.errors import UserError
from opdkit.cli.command import Command, trust_flag


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="one model; or several as NAME=MODEL, which share the workers",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (default: 8000)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the server asks for no password: keep it on this machine (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="let --host be an address that other machines reach",
    )
    parser.add_argument(
        "--host-names",
        default="",
        metavar="NAME,...",
        help="names of this machine that clients' URLs have, beside its own, addresses and "
        "localhost",
    )
    parser.add_argument("--name", help="what one model is called in answers (default: MODEL)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--max-batch-tokens", type=int, metavar="N", help="padded tokens of one forward pass"
    )
    _pool_flags(parser)
    trust_flag(parser)


def _pool_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that hold one of several models each (default: one for each device)",
    )
    parser.add_argument(
        "--devices",
        default="",
        metavar="DEVICE,...",
        help="of the workers, such as cuda:0,cuda:1 (default: every GPU, else the CPU)",
    )
    parser.add_argument(
        "--keep-on-cpu",
        type=float,
        default=0.0,
        metavar="GIB",
        help="memory, of all workers together, for the weights of models that are not held, so "
        "that a swap is a copy (default: 0, read from the files again)",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="after which a worker swaps for a request though its own model has work (default: 30)",
    )


def named(models: Sequence[str]) -> dict[str, str]:
    """Models by the names that NAME=MODEL gives them; empty where one has none and is alone. A
    folder that exists is a model, whatever its name.
    """
    pairs = [(None, model) if Path(model).is_dir() else _pair(model) for model in models]
    if len(pairs) == 1 and pairs[0][0] is None:
        return {}
    found: dict[str, str] = {}
    for name, model in pairs:
        if not name or not model:
            raise UserError(
                f"{model!r} has no name, and several models are asked for by theirs: give each as "
                "NAME=MODEL, such as math=Qwen/Qwen3-8B"
            )
        if name in found:
            raise UserError(f"two models are called {name!r}: give each a name of its own")
        found[name] = model
    return found


def _pair(text: str) -> tuple[str | None, str]:
    name, equals, model = text.partition("=")
    return (name, model) if equals else (None, text)


def serve_teacher(options: Any) -> None:
    from opdkit.teachers.pooled import Serving
    from opdkit.teachers.serve import serve, serve_several, worker_devices

    if not 0 <= options.port < 2**16:
        raise UserError(
            f"--port={options.port} is no port: give a number from 1 to 65535, or 0 for a free one"
        )
    host_names = [name for name in options.host_names.split(",") if name]
    models = named(options.models)
    if not models:
        if options.workers is not None or options.devices or options.keep_on_cpu:
            raise UserError(
                "--workers, --devices and --keep-on-cpu are of models that share workers: give "
                "them names, such as opdkit serve-teacher math=A code=B --workers 2"
            )
        return serve(
            options.models[0],
            host=options.host,
            port=options.port,
            dtype=options.dtype,
            device=options.device,
            name=options.name,
            max_batch_tokens=options.max_batch_tokens,
            allow_remote=options.allow_remote,
            host_names=host_names,
            trust_remote_code=options.trust_remote_code,
        )
    if options.name is not None:
        raise UserError("--name is of one model: here each has its own, as NAME=MODEL")
    if options.keep_on_cpu < 0 or options.patience <= 0:
        raise UserError("--keep-on-cpu must be at least 0, and --patience more than 0")
    devices = worker_devices(
        options.device, [one for one in options.devices.split(",") if one], options.workers
    )
    serving = Serving(
        models,
        options.dtype,
        options.max_batch_tokens,
        options.trust_remote_code,
        keep=int(options.keep_on_cpu * 2**30 / len(devices)),
        workers=len(devices),
    )
    return serve_several(
        serving,
        devices,
        host=options.host,
        port=options.port,
        patience=options.patience,
        allow_remote=options.allow_remote,
        host_names=host_names,
    )


SERVE_TEACHER = Command(
    "serve-teacher",
    "serve local models that score tokens over HTTP, for runs with teacher=http://...",
    serve_teacher,
    arguments,
)
