"""`opdkit quickstart`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opdkit.cli.command import Command


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        default="quickstart",
        metavar="DIR",
        help="folder for models, run and report (default: quickstart)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="opd", metavar="NAME")


def run(options: Any) -> None:
    from opdkit.recipes.quickstart import quickstart

    quickstart(Path(options.out), seed=options.seed, method=options.method)


QUICKSTART = Command("quickstart", "the whole story on a CPU, offline, in minutes", run, arguments)
