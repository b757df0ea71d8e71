"""`opdkit train`, and its dry run."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opdkit.base.errors import UserError
from opdkit.base.launched import CLAIM, rank
from opdkit.cli.command import Command, described_run

if TYPE_CHECKING:
    from opdkit.run.settings import Run

NAMED = (
    "student",
    "teacher",
    "reference",
    "sampler",
    "method",
    "data",
    "output",
    "reward",
    "environment",
)
# flags of a dry run
DRY = (
    "device",
    "device_memory",
    "device_tflops",
    "device_bandwidth",
    "device_link",
    "device_network",
    "mfu",
    "response_length",
    "json",
)
LAID_OUT = ("sampler", "ahead", "cluster")  # settings that a layout decides


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", help="a run's YAML file")
    parser.add_argument("--recipe", metavar="NAME", help="a built-in recipe, or file.py:function")
    for name in NAMED:
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"same as {name}=...")
    parser.add_argument(
        "--lora", type=int, metavar="RANK", help="train adapters of this rank: same as lora.r=RANK"
    )
    parser.add_argument(
        "--times",
        action="append",
        default=[],
        metavar="METHOD",
        help="multiply by this method's weight, such as iw_opd; repeatable",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="train in N processes of this machine, one per GPU; several machines: torchrun",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="with --resume: go on with other settings or data than the checkpoint's",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the output folder"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved run with its memory and time, load nothing, and stop",
    )
    _of_a_dry_run(parser)
    parser.epilog = (
        "further settings as key=value: optim.learning_rate=1e-5, num_generations=4, method.k=64"
    )


def _of_a_dry_run(parser: argparse.ArgumentParser) -> None:
    dry = parser.add_argument_group(
        "of a dry run", "what it is reckoned for; by default the device at hand"
    )
    dry.add_argument(
        "--device",
        metavar="NAME",
        help="h100, h200, a100, a100-40gb, l40s, l4 or cpu; 8xh100: so many of a machine; "
        "2x8xh100: of each of two; 8x80GB",
    )
    dry.add_argument(
        "--device-memory", metavar="80GB", help="of a device in no table, or instead of the table's"
    )
    dry.add_argument(
        "--device-tflops", type=float, metavar="N", help="peak of its bfloat16 matrix products"
    )
    dry.add_argument("--device-bandwidth", metavar="3.35TB/s", help="peak of its memory")
    dry.add_argument(
        "--device-link", metavar="450GB/s", help="peak from one device to those of its machine"
    )
    dry.add_argument(
        "--device-network", metavar="50GB/s", help="peak between machines, of each device"
    )
    dry.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="of that peak, reached while learning (default: 0.4)",
    )
    dry.add_argument(
        "--response-length",
        type=float,
        metavar="N",
        help="mean tokens of a response (default: half of the limit)",
    )
    dry.add_argument("--json", action="store_true", help="print it as JSON")


def train(options: Any) -> int | None:
    from opdkit.run.launch import execute

    if options.nproc is not None and not options.dry_run and CLAIM not in os.environ:
        from opdkit.run.processes import on_several

        return on_several(options.nproc, options.typed)  # in each of them the claim is named
    flags = [f"method.times={json.dumps(options.times)}"] if options.times else []
    flags += [f"lora.r={options.lora}"] if options.lora is not None else []
    run = described_run(options, NAMED, flags)
    if options.dry_run:
        dry_run(options, run, flags)
        return None
    for name in DRY:
        if getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')} is about an estimate: add --dry-run, or leave it out"
            )
    result = execute(
        run,
        resume=options.resume,
        overwrite=options.overwrite,
        allow_changes=options.allow_changes,
    )
    if rank() == 0:
        print(f"model   {result.model}\nreport  {result.report}")
    return None


def _typed(options: Any, flags: Sequence[str]) -> str:
    """The run as it was typed, for a command that goes on with what a layout decides."""
    begin = ["--recipe", options.recipe] if options.recipe else []
    begin += [options.file] if options.file else []
    named = [f"{n}={getattr(options, n)}" for n in NAMED if getattr(options, n) is not None]
    settings = [
        text
        for text in (*named, *flags, *options.settings)
        if re.split(r"[.=]", text)[0] not in LAID_OUT
    ]
    return shlex.join([*begin, *settings]) or "RUN.yaml"


def dry_run(options: Any, run: Run, flags: Sequence[str]) -> None:
    from opdkit.run.plan import Rates, find_machines, plan, plan_on

    machines = find_machines(
        options.device,
        options.nproc,
        memory=options.device_memory,
        tflops=options.device_tflops,
        bandwidth=options.device_bandwidth,
        link=options.device_link,
        network=options.device_network,
        setting=run.device,
    )
    rates = Rates() if options.mfu is None else Rates(learn=options.mfu)
    made: Any
    if machines.size == 1:
        made = plan(run, machines.device, rates=rates, response=options.response_length)
    else:
        typed = _typed(options, flags)
        made = plan_on(run, machines, rates=rates, response=options.response_length, file=typed)
    print(json.dumps(made.to_dict(), indent=2) if options.json else made)


TRAIN = Command("train", "distil a teacher into a student", train, arguments, settings=True)
