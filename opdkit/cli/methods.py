"""`opdkit methods`, `opdkit explain` and `opdkit check`."""

from __future__ import annotations

import argparse
from typing import Any

from opdkit.cli.command import Command, as_arguments

NAMED = "a name, file.py:function, or an expression in quotes: 'tropd * iw_opd(gamma=1)'"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", help=NAMED)


def list_methods(options: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from opdkit.methods.explain import table

    shown = Table(box=None, pad_edge=False)
    for column in ("method", "idea", "source", "needs", "passes"):
        shown.add_column(column, no_wrap=column in ("method", "source"))
    for row in table():
        shown.add_row(*row.values())
    console = Console(soft_wrap=False)
    with console.capture() as text:  # rich would exit by itself where the reader has gone
        console.print(shown)
    print(text.get(), end="")
    print(
        "\npasses: forward passes of a step besides sampling. opdkit explain METHOD prints the "
        "formula."
    )


def explain_method(options: Any) -> None:
    from opdkit.methods.explain import explain

    print(explain(options.method, **as_arguments(options.settings)))


def check_method(options: Any) -> int:
    from opdkit.methods.method import load
    from opdkit.testing import CheckFailed, check

    try:
        print(check(load(options.method, **as_arguments(options.settings))))
    except CheckFailed as failure:
        print(failure)
        return 1
    return 0


METHODS = Command(
    "methods", "list every method with its source, what it needs and its cost", list_methods
)
EXPLAIN = Command(
    "explain",
    "print a method's formula, needs, forward passes and memory",
    explain_method,
    arguments,
    settings=True,
)
CHECK = Command(
    "check", "run the tests that every method must pass", check_method, arguments, settings=True
)
