"""`opdkit export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opdkit.cli.command import Command, trust_flag


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder checkpoint-N of a run")
    parser.add_argument("out", metavar="DIR", help="what to write, for from_pretrained")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="add adapters to the model that they belong to (default: the adapters alone)",
    )
    trust_flag(parser)


def export(options: Any) -> int | None:
    from opdkit.run.export import export as write

    write(
        Path(options.checkpoint).expanduser(),
        Path(options.out).expanduser(),
        options.merge,
        options.trust_remote_code,
    )
    print(f"model     {options.out}")
    return None


EXPORT = Command(
    "export",
    "write the model of a checkpoint as plain Hugging Face weights, in one process on the CPU",
    export,
    arguments,
)
