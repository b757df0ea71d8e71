"""`opdkit compare`."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from opdkit.cli.command import Command, as_arguments, interrupted


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "methods",
        nargs="+",
        metavar="METHOD",
        help="tropd, tropd:k=32, file.py:function, 'tropd * iw_opd'; the first is the baseline",
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME",
        help="a built-in recipe, file.py:function, or a run's YAML file",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument(
        "--out",
        default="runs/comparison",
        metavar="DIR",
        help="a comparison in it is continued (default: runs/comparison)",
    )


def run(options: Any) -> int:
    from opdkit.study.compare import compare

    texts = [*options.methods, *options.settings]
    # of a method's arguments, `:` or `(` comes first
    settings = [text for text in texts if re.match(r"[\w.]+=", text)]
    methods = [text for text in texts if text not in settings]
    try:
        result = compare(
            methods, options.recipe, options.seeds, options.out, **as_arguments(settings)
        )
    except KeyboardInterrupt as stop:
        return interrupted(stop, "the same command continues")
    print(f"{result}\npage     {result.page}\nnumbers  {result.parquet}")
    for (method, seed), reason in result.failed.items():
        print(f"opdkit: {method} with seed {seed} failed: {reason}", file=sys.stderr)
    return 1 if result.failed else 0


COMPARE = Command(
    "compare",
    "run methods under the same prompts, seeds and budget, and draw them side by side",
    run,
    arguments,
    settings=True,
)
