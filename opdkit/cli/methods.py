"""`opdkit methods`, `opdkit explain` and `opdkit check`."""

from __future__ import annotations

import argparse
from typing import Any

from opdkit.base.errors import UserError, nearest
from opdkit.cli.command import Command, as_arguments
from opdkit.methods import FAMILIES

NAMED = "a name, file.py:function, or an expression in quotes: 'tropd * iw_opd(gamma=1)'"

COLUMNS = ("method", "idea", "source", "needs", "passes")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", help=NAMED)


def which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--family",
        metavar="NAME",
        help=f"only these: {', '.join(FAMILIES)}",
    )


def list_methods(options: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from opdkit.methods.explain import table

    wanted = options.family
    if wanted is not None and wanted not in FAMILIES:
        raise UserError(
            f"there is no family of methods {wanted!r}{nearest(wanted, list(FAMILIES))} (there are "
            f"{', '.join(FAMILIES)})"
        )
    rows = {row["method"]: row for row in table()}
    console = Console(soft_wrap=False)
    with console.capture() as text:  # rich would exit by itself where the reader has gone
        for name, family in FAMILIES.items():
            if wanted not in (None, name):
                continue
            console.print(f"{name}: {family.about}\n")
            shown = Table(box=None, pad_edge=False)
            for column in COLUMNS:
                shown.add_column(column, no_wrap=column in ("method", "source"))
            for method in family.methods:
                shown.add_row(*(rows[method][column] for column in COLUMNS))
            console.print(shown)
            console.print()
    print(text.get(), end="")
    print(
        "passes: forward passes of a step besides sampling. opdkit explain METHOD prints the "
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
    "methods",
    "list every method, by family, with its source, what it needs and its cost",
    list_methods,
    which,
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
