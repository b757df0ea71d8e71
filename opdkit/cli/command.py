"""A command of the command line, and what several of them share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opdkit.base.errors import UserError
from opdkit.base.interrupt import status

if TYPE_CHECKING:
    from opdkit.run.settings import Run
    from opdkit.types import Sampling


@dataclass(frozen=True)
class Command:
    """One command: `opdkit NAME ...`.

    Arguments:
        name: what is typed.
        help: one line for `opdkit --help`.
        run: does it with the parsed options; returns an exit status, or None for 0.
        arguments: adds the command's own flags to its parser.
        settings: whether `key=value` texts may follow, as `options.settings`.
    """

    name: str
    help: str
    run: Callable[[Any], int | None]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    settings: bool = False

    def add_to(self, commands: Any) -> None:
        """Add it to the subparsers of a parser."""
        parser = commands.add_parser(self.name, help=self.help, description=self.help)
        parser.set_defaults(run=self.run)
        self.arguments(parser)
        if self.settings:
            parser.add_argument("settings", nargs="*", metavar="key=value")


def interrupted(stop: KeyboardInterrupt, then: str) -> int:
    """Says how to go on, where somebody is left to read it, and returns the exit status."""
    with suppress(OSError):  # SIGHUP: the terminal is gone
        print(f"opdkit: interrupted; {then}", file=sys.stderr)
    return status(stop)


def print_table(rows: Sequence[Mapping[str, Any]], whole: Sequence[str] = ()) -> None:
    """Rows of columns by name, the same in each; columns in `whole` are never broken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else ():
        shown.add_column(column, no_wrap=column in whole)
    for row in rows:
        texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        shown.add_row(*map(escape, texts))
    console = Console(soft_wrap=False)
    with console.capture() as text:  # rich would exit by itself where the reader has gone
        console.print(shown)
    print(text.get(), end="")


def trust_flag(parser: argparse.ArgumentParser) -> None:
    """Whether a model may bring code of its own."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that comes with the model, which can do anything: read it first",
    )


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How responses are drawn."""
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-completion-length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    trust_flag(parser)


def sampling(options: Any) -> Sampling:
    """What `sampling_flags` and --samples say."""
    from opdkit.types import Sampling

    if not 0 <= options.seed < 2**32:
        raise UserError(
            f"--seed={options.seed} must be between 0 and 2^32 - 1: generators of random numbers "
            "take no other"
        )
    return Sampling(
        options.temperature,
        options.top_p,
        max_completion_length=options.max_completion_length,
        num_generations=options.samples,
    )


def as_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as a mapping."""
    from opdkit.base.config import parse_overrides

    return dict(parse_overrides(texts))


def described_run(options: Any, names: Sequence[str], more: Sequence[str] = ()) -> Run:
    """The run that a command's recipe or file, flags and settings describe."""
    from opdkit.recipes import make, recipe
    from opdkit.run.settings import load_run, make_run

    flags = [
        *(f"{n}={getattr(options, n)}" for n in names if getattr(options, n) is not None),
        *more,
    ]
    # train --recipe gsm8k steps=10: the first setting stands where the file would
    if options.file and "=" in options.file:
        options.settings, options.file = [options.file, *options.settings], None
    settings = list(options.settings)
    if options.recipe and options.file:
        raise UserError(
            f"both the recipe {options.recipe} and the file {options.file} are given: choose one"
        )
    if options.recipe:
        run = make_run(recipe(options.recipe), flags + settings)
        make(options.recipe)
        return run
    return (
        load_run(options.file, flags + settings) if options.file else make_run({}, flags + settings)
    )
