"""`opdkit neighbours`."""

from __future__ import annotations

import argparse
from typing import Any

from opdkit.cli.command import Command, as_arguments, interrupted, print_table


def arguments(parser: argparse.ArgumentParser) -> None:
    what = "which to run; without it all are listed"
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help=what)


def run(options: Any) -> int:
    from opdkit.neighbours.experiment import launch, listed

    if not options.name:
        print_table(listed(), whole=("name", "source"))
        print("\nopdkit neighbours NAME key=value ... runs one; docs/neighbours.md shows them all.")
        return 0
    try:
        outcome, folder = launch(options.name, as_arguments(options.settings))
    except KeyboardInterrupt as stop:
        return interrupted(stop, "the same command starts anew")
    print_table(outcome.table)
    print(f"\nclaim    {outcome.claim}\nfound    {outcome.found}")
    print(f"seen     {'yes' if outcome.holds else 'not with 95 %'}")
    print(f"figure   {folder / 'figure.png'}\nnumbers  {folder / 'outcome.json'}")
    return 0


NEIGHBOURS = Command(
    "neighbours",
    "list or run experiments with what papers propose outside token rollouts",
    run,
    arguments,
    settings=True,
)
