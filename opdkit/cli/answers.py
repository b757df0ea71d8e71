"""`opdkit eval` and `opdkit sample`: what a model answers, and how good that is."""

from __future__ import annotations

import argparse
from typing import Any

from opdkit.base.errors import UserError
from opdkit.cli.command import Command, sampling, sampling_flags


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
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

    try:
        ks = tuple(int(k) for k in options.k.split(","))
    except ValueError:
        raise UserError(f"--k {options.k} must be numbers, such as 1,4,8") from None
    thinking = None if options.thinking is None else options.thinking == "on"
    given = {name: getattr(options, name) for name in ("split", "limit", "template", "system")}
    data = build(Data, {"source": options.data, **given, "enable_thinking": thinking}, "data.")
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
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="responses per prompt")
    sampling_flags(parser)


def sample(options: Any) -> None:
    from opdkit.base.config import build
    from opdkit.run.commands import sample_model
    from opdkit.run.settings import Data

    if not options.prompt and not options.data:
        raise UserError("there is nothing to answer: give a prompt, or --data FILE")
    data = {"source": options.data, "limit": options.limit}
    prompts = build(Data, data, "data.") if options.data else options.prompt
    for rollout in sample_model(
        options.model,
        prompts,
        sampling(options),
        dtype=options.dtype,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    ):
        print(f"--- {rollout.id} ({len(rollout.tokens)} tokens, {rollout.finish})\n{rollout.text}")


EVAL = Command(
    "eval",
    "score a model on a data set: Avg@k and Pass@k with confidence intervals",
    evaluate,
    eval_arguments,
)
SAMPLE = Command("sample", "print a model's responses", sample, sample_arguments)
