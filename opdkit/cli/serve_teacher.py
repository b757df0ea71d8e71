"""`opdkit serve-teacher`."""

from __future__ import annotations

import argparse
from typing import Any

from opdkit.base.errors import UserError
from opdkit.cli.command import Command, trust_flag


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
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
    parser.add_argument("--name", help="what the model is called in answers (default: MODEL)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--max-batch-tokens", type=int, metavar="N", help="padded tokens of one forward pass"
    )
    trust_flag(parser)


def serve_teacher(options: Any) -> None:
    from opdkit.teachers.serve import serve

    if not 0 <= options.port < 2**16:
        raise UserError(
            f"--port={options.port} is no port: give a number from 1 to 65535, or 0 for a free one"
        )

    serve(
        options.model,
        host=options.host,
        port=options.port,
        dtype=options.dtype,
        device=options.device,
        name=options.name,
        max_batch_tokens=options.max_batch_tokens,
        allow_remote=options.allow_remote,
        host_names=[name for name in options.host_names.split(",") if name],
        trust_remote_code=options.trust_remote_code,
    )


SERVE_TEACHER = Command(
    "serve-teacher",
    "serve a local model that scores tokens over HTTP, for runs with teacher=http://...",
    serve_teacher,
    arguments,
)
