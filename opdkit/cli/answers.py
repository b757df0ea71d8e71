"""`opdkit eval` and `opdkit sample`: what a model answers, and how good that is."""

from __future__ import annotations

import argparse
from typing import Any

from opdkit.base.errors import UserError
from opdkit.cli.command import Command, sampling, sampling_flags


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--data", help="default with an environment: its own tasks")
    environment_flag(parser)
    parser.add_argument("--split")
    parser.add_argument("--limit", type=int)
    parser.add_argument(
        "--template",
        help='what the model is asked, such as "{prompt}\\nPut your answer in \\\\boxed{{}}."',
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="enable_thinking of chat templates that know it (Qwen3), as in training",
    )
    parser.add_argument("--reward", default="math")
    parser.add_argument("--k", default="1", help="Pass@k for these k, such as 1,4,8")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="responses per problem")
    parser.add_argument("--out", metavar="FILE", help="keep every response in this JSONL file")
    sampling_flags(parser)


def evaluate(options: Any) -> None:
    from opdkit.base.config import build
    from opdkit.run.commands import eval_model
    from opdkit.run.settings import Data

    source = data_of(options)
    if source is None:
        raise UserError("there is nothing to evaluate on: give --data FILE")
    try:
        ks = tuple(int(k) for k in options.k.split(","))
    except ValueError:
        raise UserError(f"--k {options.k} must be numbers, such as 1,4,8") from None
    thinking = None if options.thinking is None else options.thinking == "on"
    given = {name: getattr(options, name) for name in ("split", "limit", "template", "system")}
    data = build(Data, {"source": source, **given, "enable_thinking": thinking}, "data.")
    out = eval_model(
        options.model,
        data,
        options.reward,
        sampling=sampling(options),
        num_generations=options.samples,
        ks=ks,
        dtype=options.dtype,
        seed=options.seed,
        keep=options.out,
        trust_remote_code=options.trust_remote_code,
        environment=world_of(options),
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


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("prompt", nargs="*", help="texts; or give --data")
    parser.add_argument("--data")
    environment_flag(parser)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="responses per prompt")
    sampling_flags(parser)


def sample(options: Any) -> None:
    from opdkit.base.config import build
    from opdkit.run.commands import sample_model
    from opdkit.run.settings import Data

    source = None if options.prompt else data_of(options)
    if not options.prompt and source is None:
        raise UserError("there is nothing to answer: give a prompt, or --data FILE")
    data = {"source": source, "limit": options.limit}
    prompts = build(Data, data, "data.") if source else options.prompt
    for rollout in sample_model(
        options.model,
        prompts,
        sampling(options),
        dtype=options.dtype,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        environment=world_of(options),
    ):
        worth = "" if rollout.reward is None else f", reward {rollout.reward:g}"
        told = f"{rollout.id} ({len(rollout.tokens)} tokens, {rollout.finish}{worth})"
        print(f"--- {told}\n{rollout.text}")


def environment_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--environment",
        metavar="NAME",
        help="let the model act in it, turn by turn: a kind, file.py:Class, or {kind: ...}",
    )


def world_of(options: Any) -> Any:
    """The environment that a flag names; settings are written as YAML."""
    from opdkit.base.config import parse_overrides

    if options.environment is None:
        return None
    [(_, value)] = parse_overrides([f"environment={options.environment}"])
    return value


def data_of(options: Any) -> str | None:
    """The data that flags name: without --data the tasks that the environment makes itself."""
    if options.data is not None or options.environment is None:
        return options.data
    from opdkit.environments.kinds import environment_of
    from opdkit.run.settings import OWN_TASKS

    return OWN_TASKS if environment_of(world_of(options)).makes_rows else None


EVAL = Command(
    "eval",
    "score a model on a data set: Avg@k and Pass@k with confidence intervals",
    evaluate,
    eval_arguments,
)
SAMPLE = Command("sample", "print a model's responses", sample, sample_arguments)
