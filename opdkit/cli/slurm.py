"""`opdkit slurm`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from opdkit.cli.command import Command, described_run


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", help="a run's YAML file")
    parser.add_argument("--recipe", metavar="NAME", help="a built-in recipe, or file.py:function")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument(
        "--gpus",
        type=int,
        default=8,
        metavar="N",
        help="of each, and as many processes (default: 8)",
    )
    parser.add_argument(
        "--time", default="24:00:00", help="after which the job takes another turn (24:00:00)"
    )
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument(
        "--grace",
        type=int,
        default=120,
        metavar="SECONDS",
        help="before the end, in which the run is saved: more than a step and a checkpoint take "
        "(default: 120)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option of sbatch, such as --sbatch=--mem=0; repeatable",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the output folder"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="of the script (default: the run's name with .sbatch)"
    )
    parser.epilog = "further settings as key=value: output=/shared/runs/gsm8k, steps=500"


def slurm(options: Any) -> None:
    from opdkit.run.slurm import Job, write_script

    run = described_run(options, ())
    if options.recipe:
        command = ["--recipe", options.recipe]
    else:
        command = [str(Path(options.file).absolute())] if options.file else []
    job = Job(
        (*command, *(text for text in options.settings if not text.startswith("output="))),
        nodes=options.nodes,
        gpus=options.gpus,
        time=options.time,
        partition=options.partition,
        account=options.account,
        grace=options.grace,
        resume=options.resume,
        more=tuple(options.sbatch),
    )
    path = write_script(run, job, Path(options.output) if options.output else None)
    print(f"script  {path}\nsubmit  sbatch {shlex.quote(str(path))}")


SLURM = Command(
    "slurm",
    "write a batch job of SLURM that trains a run on several machines",
    slurm,
    arguments,
    settings=True,
)
