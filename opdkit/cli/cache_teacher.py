"""`opdkit cache-teacher`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opdkit.cli.command import Command, described_run, interrupted


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        help="a run's YAML file: its student, teacher, data, sampling and seed are taken",
    )
    parser.add_argument("--recipe", metavar="NAME", help="a built-in recipe, or file.py:function")
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"same as {name}=...")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="a cache in it is continued; damaged parts are written again",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="store the teacher's K most probable tokens too (default: 0)",
    )
    parser.add_argument("--num-generations", type=int, metavar="N", help="responses per prompt")
    parser.add_argument(
        "--sft-teacher",
        metavar="MODEL",
        help="who wrote what the student was fine-tuned on; warns where it is not the teacher",
    )
    parser.add_argument(
        "--prompts-per-shard",
        type=int,
        default=256,
        metavar="N",
        help="what an interruption can lose (default: 256)",
    )
    parser.epilog = (
        "further settings as key=value: max_completion_length=4096, temperature=0.8, seed=1"
    )


def cache(options: Any) -> int | None:
    from opdkit.run.cache_teacher import cache_teacher

    flags = (
        []
        if options.num_generations is None
        else [f"sampling.num_generations={options.num_generations}"]
    )
    run = described_run(options, ("student", "teacher", "data"), flags)
    try:
        made = cache_teacher(
            run,
            options.out,
            top_k=options.top_k,
            sft_teacher=options.sft_teacher,
            prompts_per_shard=options.prompts_per_shard,
        )
    except KeyboardInterrupt as stop:
        return interrupted(
            stop, "every finished shard stays, and the same command continues with the next"
        )
    size = sum((Path(options.out) / name).stat().st_size for name in made.entries)
    print(f"rollouts  {made.rollouts:,} of {made.origin.prompts:,} prompts, {made.tokens:,} tokens")
    print(
        f"cache     {options.out}, {size / 2**20:.1f} MiB, {size / max(made.tokens, 1):.1f} bytes "
        "per token"
    )
    print(
        f"train     opdkit train --method lightning_opd --student {run.student} --teacher "
        f"cached:{options.out}"
    )
    return None


CACHE_TEACHER = Command(
    "cache-teacher",
    "let the student write and the teacher score once, and store both: see lightning_opd",
    cache,
    arguments,
    settings=True,
)
