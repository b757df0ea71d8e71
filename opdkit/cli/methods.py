"""`opdkit methods`, `opdkit explain` and `opdkit check`."""

from __future__ import annotations

import argparse
from typing import Any

from opdkit.base.errors import UserError, nearest
from opdkit.cli.command import Command, as_arguments, print_table
from opdkit.methods import FAMILIES

NAMED = "a name, file.py:function, or an expression in quotes: 'tropd * iw_opd(gamma=1)'"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", help=NAMED)


def which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--family",
        metavar="NAME",
        help=f"only these: {', '.join(FAMILIES)}",
    )


def list_methods(options: Any) -> None:
    from opdkit.methods.explain import table

    wanted = options.family
    if wanted is not None and wanted not in FAMILIES:
        raise UserError(
            f"there is no family of methods {wanted!r}{nearest(wanted, list(FAMILIES))} (there are "
            f"{', '.join(FAMILIES)})"
        )
    rows = {row["method"]: row for row in table()}
    for name, family in FAMILIES.items():
        if wanted in (None, name):
            print(f"{name}: {family.about}\n")
            print_table([rows[method] for method in family.methods], whole=("method", "source"))
            print()
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
