"""`opdkit doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from opdkit.cli.command import Command


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default=".", metavar="DIR", help="where a run would write (default: here)"
    )


def show_machine(options: Any) -> None:
    from opdkit.run.doctor import doctor

    print(doctor(options.output))


DOCTOR = Command(
    "doctor",
    "show what this machine offers and which path each phase will take",
    show_machine,
    arguments,
)
