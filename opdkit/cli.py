"""The command line: each command is a function of the package with its arguments."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdkit.base.errors import UserError
from opdkit.base.interrupt import status, stoppable

if TYPE_CHECKING:
    from opdkit.run.settings import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 for an error that the user can mend, 128 + its number for a
    signal (Ctrl-C: 130).
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "settings") and all(
        "=" in text and not text.startswith("-") for text in rest
    ):
        options.settings += rest  # key=value after a flag
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    _environment()
    try:
        with stoppable():
            return options.run(options) or 0
    except UserError as error:
        print(f"opdkit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return _interrupted(stop, "continue with --resume")
    except BrokenPipeError:
        return 0


def _interrupted(stop: KeyboardInterrupt, then: str) -> int:
    """Says how to go on, where somebody is left to read it, and returns the exit status."""
    with suppress(OSError):  # SIGHUP: the terminal is gone
        print(f"opdkit: interrupted; {then}", file=sys.stderr)
    return status(stop)


def _environment() -> None:
    """Defaults for the libraries, before they are loaded: no bars of their own, no spinning
    threads. What the user has set stays.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # spinning threads: 1.4x faster when idle, 10x slower when busy
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# ------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opdkit", description="On-policy distillation of language models."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int | None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    sub = command("quickstart", _quickstart, "the whole story on a CPU, offline, in minutes")
    sub.add_argument(
        "--out",
        default="quickstart",
        metavar="DIR",
        help="folder for models, run and report (default: quickstart)",
    )
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--method", default="opd", metavar="NAME")

    sub = command("train", _train, "distil a teacher into a student")
    sub.add_argument("file", nargs="?", help="a run's YAML file")
    sub.add_argument("--recipe", metavar="NAME", help="a built-in recipe, or file.py:function")
    for name in ("student", "teacher", "sampler", "method", "data", "output", "reward"):
        sub.add_argument(f"--{name}", metavar=name.upper(), help=f"same as {name}=...")
    sub.add_argument(
        "--lora", type=int, metavar="RANK", help="train adapters of this rank: same as lora.r=RANK"
    )
    sub.add_argument(
        "--times",
        action="append",
        default=[],
        metavar="METHOD",
        help="multiply by this method's weight, such as iw_opd; repeatable",
    )
    sub.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    sub.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the output folder"
    )
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved run with its memory and time, load nothing, and stop",
    )
    dry = sub.add_argument_group(
        "of a dry run", "what it is reckoned for; by default the device at hand"
    )
    dry.add_argument(
        "--device", metavar="NAME", help="h100, h200, a100, a100-40gb, l40s, l4 or cpu"
    )
    dry.add_argument(
        "--device-memory", metavar="80GB", help="of a device in no table, or instead of the table's"
    )
    dry.add_argument(
        "--device-tflops", type=float, metavar="N", help="peak of its bfloat16 matrix products"
    )
    dry.add_argument("--device-bandwidth", metavar="3.35TB/s", help="peak of its memory")
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
    sub.epilog = (
        "further settings as key=value: optim.learning_rate=1e-5, num_generations=4, method.k=64"
    )

    sub = command(
        "cache-teacher",
        _cache_teacher,
        "let the student write and the teacher score once, and store both: see lightning_opd",
    )
    sub.add_argument(
        "file",
        nargs="?",
        help="a run's YAML file: its student, teacher, data, sampling and seed are taken",
    )
    sub.add_argument("--recipe", metavar="NAME", help="a built-in recipe, or file.py:function")
    for name in ("student", "teacher", "data"):
        sub.add_argument(f"--{name}", metavar=name.upper(), help=f"same as {name}=...")
    sub.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="a cache in it is continued; damaged parts are written again",
    )
    sub.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="store the teacher's K most probable tokens too (default: 0)",
    )
    sub.add_argument("--num-generations", type=int, metavar="N", help="responses per prompt")
    sub.add_argument(
        "--sft-teacher",
        metavar="MODEL",
        help="who wrote what the student was fine-tuned on; warns where it is not the teacher",
    )
    sub.add_argument(
        "--prompts-per-shard",
        type=int,
        default=256,
        metavar="N",
        help="what an interruption can lose (default: 256)",
    )
    sub.epilog = (
        "further settings as key=value: max_completion_length=4096, temperature=0.8, seed=1"
    )

    sub = command(
        "serve-teacher",
        _serve_teacher,
        "serve a local model that scores tokens over HTTP, for runs with teacher=http://...",
    )
    sub.add_argument("model")
    sub.add_argument("--port", type=int, default=8000, help="0: a free one (default: 8000)")
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        help="the server asks for no password: keep it on this machine (default: 127.0.0.1)",
    )
    sub.add_argument(
        "--allow-remote",
        action="store_true",
        help="let --host be an address that other machines reach",
    )
    sub.add_argument("--name", help="what the model is called in answers (default: MODEL)")
    sub.add_argument("--dtype", default="float32")
    sub.add_argument("--device", default="auto")
    sub.add_argument(
        "--max-batch-tokens", type=int, metavar="N", help="padded tokens of one forward pass"
    )

    sub = command(
        "eval", _eval, "score a model on a data set: Avg@k and Pass@k with confidence intervals"
    )
    sub.add_argument("model")
    sub.add_argument("--data", required=True)
    sub.add_argument("--split")
    sub.add_argument("--limit", type=int)
    sub.add_argument(
        "--template",
        help='what the model is asked, such as "{prompt}\\nPut your answer in \\\\boxed{{}}."',
    )
    sub.add_argument("--system", metavar="TEXT", help="system message of the chat")
    sub.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="enable_thinking of chat templates that know it (Qwen3), as in training",
    )
    sub.add_argument("--reward", default="math")
    sub.add_argument("--k", default="1", help="Pass@k for these k, such as 1,4,8")
    sub.add_argument("--samples", type=int, default=1, metavar="N", help="responses per problem")
    sub.add_argument("--out", metavar="FILE", help="keep every response in this JSONL file")
    _sampling_flags(sub)

    sub = command("sample", _sample, "print a model's responses")
    sub.add_argument("model")
    sub.add_argument("prompt", nargs="*", help="texts; or give --data")
    sub.add_argument("--data")
    sub.add_argument("--limit", type=int, default=4)
    sub.add_argument("--samples", type=int, default=1, metavar="N", help="responses per prompt")
    _sampling_flags(sub)

    sub = command(
        "compare",
        _compare,
        "run methods under the same prompts, seeds and budget, and draw them side by side",
    )
    sub.add_argument(
        "methods",
        nargs="+",
        metavar="METHOD",
        help="tropd, tropd:k=32, file.py:function, 'tropd * iw_opd'; the first is the baseline",
    )
    sub.add_argument(
        "--recipe",
        required=True,
        metavar="NAME",
        help="a built-in recipe, file.py:function, or a run's YAML file",
    )
    sub.add_argument("--seeds", type=int, default=3, metavar="N")
    sub.add_argument(
        "--out",
        default="runs/comparison",
        metavar="DIR",
        help="a comparison in it is continued (default: runs/comparison)",
    )

    sub = command("report", _report, "write report.html of a run folder")
    sub.add_argument("folder")

    command("methods", _methods, "list every method with its source, what it needs and its cost")

    named = "a name, file.py:function, or an expression in quotes: 'tropd * iw_opd(gamma=1)'"
    sub = command("explain", _explain, "print a method's formula, needs, forward passes and memory")
    sub.add_argument("method", help=named)

    sub = command("check", _check, "run the tests that every method must pass")
    sub.add_argument("method", help=named)

    command("doctor", _doctor, "show what this machine offers and which path each phase will take")
    # settings and method arguments as key=value
    for name in ("train", "cache-teacher", "explain", "check", "compare"):
        commands.choices[name].add_argument("settings", nargs="*", metavar="key=value")
    return parser


def _sampling_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--max-completion-length", type=int, default=512)
    sub.add_argument("--dtype", default="float32")
    sub.add_argument("--seed", type=int, default=0)


def _sampling(options: Any) -> Any:
    from opdkit.types import Sampling

    return Sampling(
        options.temperature,
        options.top_p,
        max_completion_length=options.max_completion_length,
        num_generations=options.samples,
    )


def _arguments(texts: Sequence[str]) -> dict[str, Any]:
    from opdkit.base.config import parse_overrides

    return dict(parse_overrides(texts))


# ----------------------------------------------------------------------------------------- commands


def _quickstart(options: Any) -> None:
    from opdkit.recipes.quickstart import quickstart

    quickstart(Path(options.out), seed=options.seed, method=options.method)


def _train(options: Any) -> None:
    from opdkit.run.launch import execute

    flags = [f"method.times={json.dumps(options.times)}"] if options.times else []
    flags += [f"lora.r={options.lora}"] if options.lora is not None else []
    run = _run(
        options, ("student", "teacher", "sampler", "method", "data", "output", "reward"), flags
    )
    if options.dry_run:
        _dry_run(options, run)
        return
    for name in DRY:
        if getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')} is about an estimate: add --dry-run, or leave it out"
            )
    result = execute(run, resume=options.resume, overwrite=options.overwrite)
    print(f"model   {result.model}\nreport  {result.report}")


# flags of a dry run
DRY = (
    "device",
    "device_memory",
    "device_tflops",
    "device_bandwidth",
    "mfu",
    "response_length",
    "json",
)


def _dry_run(options: Any, run: Run) -> None:
    from opdkit.run.plan import Rates, device_of, plan

    device = device_of(
        options.device,
        memory=options.device_memory,
        tflops=options.device_tflops,
        bandwidth=options.device_bandwidth,
        setting=run.device,
    )
    rates = Rates() if options.mfu is None else Rates(learn=options.mfu)
    made = plan(run, device, rates=rates, response=options.response_length)
    print(json.dumps(made.to_dict(), indent=2) if options.json else made)


def _run(options: Any, names: Sequence[str], more: Sequence[str] = ()) -> Run:
    """The run that a command's recipe or file, flags and settings describe."""
    from opdkit.recipes import make, recipe
    from opdkit.run.settings import load_run, make_run

    flags = [*(f"{n}={getattr(options, n)}" for n in names if getattr(options, n)), *more]
    settings = list(options.settings)
    # train --recipe gsm8k steps=10: the first setting stands where the file would
    if options.file and "=" in options.file:
        settings.insert(0, options.file)
        options.file = None
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


def _cache_teacher(options: Any) -> int | None:
    from opdkit.run.cache_teacher import cache_teacher

    flags = (
        []
        if options.num_generations is None
        else [f"sampling.num_generations={options.num_generations}"]
    )
    run = _run(options, ("student", "teacher", "data"), flags)
    try:
        made = cache_teacher(
            run,
            options.out,
            top_k=options.top_k,
            sft_teacher=options.sft_teacher,
            prompts_per_shard=options.prompts_per_shard,
        )
    except KeyboardInterrupt as stop:
        return _interrupted(
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


def _serve_teacher(options: Any) -> None:
    from opdkit.teachers.serve import serve

    serve(
        options.model,
        host=options.host,
        port=options.port,
        dtype=options.dtype,
        device=options.device,
        name=options.name,
        max_batch_tokens=options.max_batch_tokens,
        allow_remote=options.allow_remote,
    )


def _eval(options: Any) -> None:
    from opdkit.run.commands import eval_model
    from opdkit.run.settings import Data

    try:
        ks = tuple(int(k) for k in options.k.split(","))
    except ValueError:
        raise UserError(f"--k {options.k} must be numbers, such as 1,4,8") from None
    thinking = None if options.thinking is None else options.thinking == "on"
    data = Data(
        options.data,
        split=options.split,
        limit=options.limit,
        template=options.template,
        system=options.system,
        enable_thinking=thinking,
    )
    out = eval_model(
        options.model,
        data,
        options.reward,
        sampling=_sampling(options),
        num_generations=options.samples,
        ks=ks,
        dtype=options.dtype,
        seed=options.seed,
        keep=options.out,
    )
    interval = out.avg_at_k.interval
    print(f"problems    {out.n_problems}, {out.samples_per_problem} samples each")
    print(
        f"Avg@{out.samples_per_problem:<7} {out.avg_at_k.value:.4f}  95% [{interval.low:.4f}, "
        f"{interval.high:.4f}]"
    )
    for k, estimate in out.pass_at_k.items():
        print(
            f"Pass@{k:<6} {estimate.value:.4f}  95% [{estimate.interval.low:.4f}, "
            f"{estimate.interval.high:.4f}]"
        )
    print(f"length      {out.mean_length:.1f} tokens, {out.truncated_share:.1%} truncated")


def _sample(options: Any) -> None:
    from opdkit.run.commands import sample_model
    from opdkit.run.settings import Data

    if not options.prompt and not options.data:
        raise UserError("there is nothing to answer: give a prompt, or --data FILE")
    prompts = Data(options.data, limit=options.limit) if options.data else options.prompt
    for rollout in sample_model(
        options.model, prompts, _sampling(options), dtype=options.dtype, seed=options.seed
    ):
        print(f"--- {rollout.id} ({len(rollout.tokens)} tokens, {rollout.finish})\n{rollout.text}")


def _compare(options: Any) -> int:
    from opdkit.study.compare import compare

    texts = [*options.methods, *options.settings]
    # of a method's arguments, `:` or `(` comes first
    settings = [text for text in texts if re.match(r"[\w.]+=", text)]
    methods = [text for text in texts if text not in settings]
    try:
        result = compare(
            methods, options.recipe, options.seeds, options.out, **_arguments(settings)
        )
    except KeyboardInterrupt as stop:
        return _interrupted(stop, "the same command continues")
    print(f"{result}\npage     {result.page}\nnumbers  {result.parquet}")
    for (method, seed), reason in result.failed.items():
        print(f"opdkit: {method} with seed {seed} failed: {reason}", file=sys.stderr)
    return 1 if result.failed else 0


def _report(options: Any) -> None:
    from opdkit.report import write_report
    from opdkit.report.read import need_folder

    print(write_report(need_folder(options.folder)))


def _methods(options: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from opdkit.methods.explain import table

    shown = Table(box=None, pad_edge=False)
    for column in ("method", "idea", "source", "needs", "passes"):
        shown.add_column(column, no_wrap=column in ("method", "source"))
    for row in table():
        shown.add_row(*row.values())
    Console(soft_wrap=False).print(shown)
    print(
        "\npasses: forward passes of a step besides sampling. opdkit explain METHOD prints the "
        "formula."
    )


def _explain(options: Any) -> None:
    from opdkit.methods.explain import explain

    print(explain(options.method, **_arguments(options.settings)))


def _check(options: Any) -> int:
    from opdkit.methods.method import load
    from opdkit.testing import CheckFailed, check

    try:
        print(check(load(options.method, **_arguments(options.settings))))
    except CheckFailed as failure:
        print(failure)
        return 1
    return 0


def _doctor(options: Any) -> None:
    from opdkit.run.doctor import doctor

    print(doctor())
