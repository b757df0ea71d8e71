"""End to end against TRL's `DistillationTrainer`: full-vocabulary reverse KL on the student's own
rollouts, the same models and prompts.

TRL's loop drives: after every few of its steps a callback lets opdkit do as many, so the two
alternate in one process. Both sample without vLLM, step the same AdamW and leave checkpoints and
reports out. Peak memory is measured with each side alone in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import (
    apart,
    begin,
    parser,
    peak_memory,
    questions,
    qwen3,
    ratios,
    save,
    spread,
    stopping,
    synchronize,
    table,
    text,
    tokenizer,
)

PHASES = ("sample", "score", "learn")
LEARNING_RATE = 1e-6  # small, so that lengths stay what they are
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Block:
    """A few steps of one side."""

    seconds: float
    tokens: int  # response tokens generated, the stop token counted
    trained: int  # positions in the loss
    rollouts: int
    loss: float  # mean over the steps, nats per token
    phases: dict[str, float]  # seconds

    @property
    def rate(self) -> float:
        """Response tokens per second of the whole step."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class World:
    """What both sides are given."""

    student: Any
    teacher: Any
    tokenizer: Any
    prompts: list[str]


def world(args: argparse.Namespace) -> World:
    """Models with random weights: 1M and 6M parameters on the CPU, the shapes of Qwen3-0.6B and
    1.7B on a GPU.
    """
    with torch.device(args.device):
        if args.size == "small":
            vocab = args.vocab
            student, teacher = (
                qwen3(96, 4, vocab, initial=0.08),
                qwen3(256, 6, vocab, initial=0.08),
            )  # far apart, at 0.02 they are not
        else:
            vocab = 151936
            student = qwen3(1024, 28, vocab, inner=3072, heads=16, kv_heads=8, head_dim=128)
            teacher = qwen3(2048, 28, vocab, inner=6144, heads=16, kv_heads=8, head_dim=128)
        chance = 1 / args.mean_length
        student, teacher = stopping(student, chance), stopping(teacher, chance)
    teacher = teacher.to(torch.bfloat16 if args.bf16 else torch.float32).requires_grad_(False)
    return World(student, teacher, tokenizer(vocab), questions(args.rollouts, vocab, args.seed))


# ------------------------------------------------------------------------------------------- opdkit


class Ours:
    """opdkit's loop, a few steps at a time."""

    def __init__(self, args: argparse.Namespace, given: World, folder: Path):
        from opdkit.run.build import prepare
        from opdkit.run.open import Given
        from opdkit.run.settings import make_run

        run = make_run(
            {
                "student": "student",
                "teacher": "teacher",
                "data": "in memory",
                "method": {"name": "opd", "support": "full"},
                "output": str(folder / "opdkit"),
                "steps": 10**3,
                "prompts_per_step": args.rollouts,
                "sampling": {"num_generations": 1, "max_completion_length": args.length},
                "optim": {"learning_rate": LEARNING_RATE, "betas": list(BETAS)},
                "dtype": "bfloat16" if args.bf16 else "float32",
                "device": args.device,
                "keep_samples": 0,
                "seed": args.seed,
            }
        )
        run.folder.mkdir(parents=True)
        rows = [{"id": str(i), "prompt": p} for i, p in enumerate(given.prompts)]
        with contextlib.redirect_stdout(io.StringIO()):
            self.job, self.state = prepare(
                run,
                Given(
                    student=copy.deepcopy(given.student),
                    teacher=given.teacher,
                    tokenizer=given.tokenizer,
                    rows=rows,
                ),
            )
        self.job.recorder.show = lambda step, metrics: self.metrics.append(dict(metrics))
        self.metrics: list[dict[str, float]] = []
        self.rollouts = args.rollouts

    def block(self, steps: int) -> Block:
        from opdkit.train.loop import train_step

        self.metrics.clear()
        before, start = self.state.tokens, time.perf_counter()
        for _ in range(steps):
            train_step(self.job, self.state)
        synchronize(str(self.job.student.device))
        seconds = time.perf_counter() - start
        phases = {phase: sum(m[f"seconds/{phase}"] for m in self.metrics) for phase in PHASES}
        phases["other"] = seconds - sum(phases.values())
        return Block(
            seconds,
            self.state.tokens - before,
            round(sum(m["tokens/trained"] for m in self.metrics)),
            self.rollouts * len(self.metrics),
            sum(m["loss"] for m in self.metrics) / steps,
            phases,
        )


# ---------------------------------------------------------------------------------------------- TRL


def trl_blocks(
    args: argparse.Namespace, given: World, folder: Path, steps: int, blocks: int, between: Any
) -> list[Block]:
    """Trains with TRL; calls `between` after every block of steps, outside of TRL's time."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    from trl.extras.profiling import ProfilingContext

    done: list[Block] = []
    seen: list[dict[str, float]] = []  # of the steps of the running block
    spent: dict[str, float] = {}  # seconds of what TRL times by itself
    clock = {"start": 0.0}

    class Counted(DistillationTrainer):
        """Notes the work of each step; changes none of it."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            mask = output["completion_mask"]
            seen.append(
                {
                    "tokens": mask.sum(),
                    "trained": output["num_items_in_batch"],
                    "rollouts": len(mask),
                }
            )
            return output

        def training_step(self, *of: Any, **named: Any) -> Any:
            loss = super().training_step(*of, **named)
            seen[-1]["loss"] = seen[-1].get("loss", 0.0) + loss  # of the micro-batches
            return loss

        def _get_last_hidden_state(self, model: Any, *of: Any, **named: Any) -> Any:
            if model.training:
                return super()._get_last_hidden_state(model, *of, **named)
            synchronize(args.device)
            start = time.perf_counter()
            states = super()._get_last_hidden_state(model, *of, **named)
            synchronize(args.device)
            spent["score"] = spent.get("score", 0.0) + time.perf_counter() - start
            return states

    def note(context: Any, seconds: float) -> None:
        spent[context.name] = spent.get(context.name, 0.0) + seconds

    class Turns(TrainerCallback):
        def on_train_begin(self, *of: Any, **named: Any) -> None:
            clock["start"] = time.perf_counter()

        def on_step_end(self, *of: Any, **named: Any) -> None:
            if len(seen) < steps:
                return
            synchronize(args.device)
            seconds = time.perf_counter() - clock["start"]
            sample = sum(v for k, v in spent.items() if k.endswith("transformers.generate"))
            phases = {"sample": sample, "score": spent.get("score", 0.0)}
            phases["learn"] = spent.get("in step", 0.0) - sum(phases.values())
            phases["other"] = seconds - sum(phases.values())
            total = {
                k: float(sum(float(s[k]) for s in seen))
                for k in ("tokens", "trained", "rollouts", "loss")
            }
            done.append(
                Block(
                    seconds,
                    int(total["tokens"]),
                    int(total["trained"]),
                    int(total["rollouts"]),
                    total["loss"] / steps,
                    phases,
                )
            )
            seen.clear()
            spent.clear()
            between(len(done))
            clock["start"] = time.perf_counter()

        def on_step_begin(self, *of: Any, **named: Any) -> None:
            clock["step"] = time.perf_counter()

        def on_optimizer_step(self, *of: Any, **named: Any) -> None:
            synchronize(args.device)
            spent["in step"] = spent.get("in step", 0.0) + time.perf_counter() - clock["step"]

    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=args.rollouts // args.trl_micro_batches,
        gradient_accumulation_steps=args.trl_micro_batches,
        max_steps=steps * blocks,
        max_completion_length=args.length,
        beta=1.0,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=args.bf16,
        use_cpu=args.device == "cpu",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=args.seed,
    )
    with (
        patch.object(ProfilingContext, "_log_metrics", note),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        trainer = Counted(
            model=copy.deepcopy(given.student),
            teacher_model=given.teacher,
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": p} for p in given.prompts] * (steps * blocks)
            ),
            processing_class=given.tokenizer,
            callbacks=[Turns()],
        )
        between(0)
        trainer.train()
    return done


# ---------------------------------------------------------------------------------------- comparing


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Blocks of both sides in turn; the first of each is warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        given = world(args)
        ours = Ours(args, given, Path(folder))
        mine: list[Block] = []

        def between(number: int) -> None:
            if number:
                mine.append(ours.block(args.steps))

        theirs = trl_blocks(args, given, Path(folder), args.steps, args.pairs + 1, between)
    mine, theirs = mine[1:], theirs[1:]
    for block in (*mine, *theirs):
        if block.tokens != block.trained or block.rollouts != args.rollouts * args.steps:
            raise AssertionError(f"work is miscounted: {block}")
    tokens = [sum(b.tokens for b in side) for side in (mine, theirs)]
    losses = [sum(b.loss for b in side) / len(side) for side in (mine, theirs)]
    # lengths are drawn; four standard errors
    if abs(tokens[0] / tokens[1] - 1) > 4 / (sum(b.rollouts for b in mine) ** 0.5):
        raise AssertionError(f"the sides did unequal work: {tokens[0]} and {tokens[1]} tokens")
    if abs(losses[0] / losses[1] - 1) > args.loss_tolerance:
        raise AssertionError(
            f"the sides minimise different losses: {losses[0]:.5f} and {losses[1]:.5f} nats per "
            "token"
        )
    return {
        "ratio": ratios([b.rate for b in mine], [b.rate for b in theirs]),
        "opdkit": summary(mine),
        "trl": summary(theirs),
    }


def summary(blocks: list[Block]) -> dict[str, Any]:
    tokens = sum(b.tokens for b in blocks)
    return {
        "tokens_per_second": spread([b.rate for b in blocks]),
        "tokens": tokens,
        "rollouts": sum(b.rollouts for b in blocks),
        "loss": sum(b.loss for b in blocks) / len(blocks),
        "microseconds_per_token": {
            phase: 1e6 * sum(b.phases[phase] for b in blocks) / tokens
            for phase in (*PHASES, "other")
        },
    }


def alone(args: argparse.Namespace, side: str) -> dict[str, float]:
    """One side in this process: bytes before its first step, and at the peak."""
    start: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        given = world(args)
        if side == "trl":
            trl_blocks(
                args,
                given,
                Path(folder),
                1,
                3,
                lambda number: None if number else start.append(peak_memory(args.device)),
            )
        else:
            ours = Ours(args, given, Path(folder))
            start.append(peak_memory(args.device))
            ours.block(3)
    return {"before": start[0], "peak": peak_memory(args.device)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--size", choices=("small", "qwen3"), help="default: small on the CPU, qwen3 on a GPU"
    )
    options.add_argument("--rollouts", type=int, default=64)
    options.add_argument(
        "--length",
        type=int,
        help="most tokens of a response; default: 64 for small models, else 256",
    )
    options.add_argument(
        "--mean-length",
        type=float,
        help="of a response that is not cut; default: 5/8 of the length",
    )
    options.add_argument("--vocab", type=int, default=4096, help="of the small models")
    options.add_argument("--steps", type=int, default=2, help="of each side in one pair")
    options.add_argument("--pairs", type=int, default=9)
    options.add_argument(
        "--trl-micro-batches",
        type=int,
        help="into which TRL cuts the rollouts of a step; default: 4 (its fastest) for small "
        "models, else 1",
    )
    options.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    options.add_argument(
        "--loss-tolerance", type=float, default=0.03, help="relative difference of the mean losses"
    )
    options.add_argument(
        "--no-memory", action="store_true", help="leave the two processes out that measure memory"
    )
    options.add_argument("--worker", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    gpu = args.device.startswith("cuda")
    args.size = args.size or ("qwen3" if gpu else "small")
    args.length = args.length or (64 if args.size == "small" else 256)
    args.trl_micro_batches = args.trl_micro_batches or (4 if args.size == "small" else 1)
    args.bf16 = gpu if args.bf16 is None else args.bf16
    args.mean_length = args.mean_length or 0.625 * args.length
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    begin(args)
    if args.worker is not None:
        task = json.loads(args.worker)
        out = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            said = alone(argparse.Namespace(**{**vars(args), **task["args"]}), task["side"])
        print(json.dumps(said), file=out)
        return said
    result = compare(args)
    if not args.no_memory:
        kept = ("size", "rollouts", "length", "mean_length", "vocab", "bf16", "trl_micro_batches")
        for side in ("opdkit", "trl"):
            task = {"side": side, "args": {k: getattr(args, k) for k in kept}}
            result[side]["memory"] = apart(__file__, task, args)
    report(args, result)
    return save("vs_trl", args, result)


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    print(
        f"{args.rollouts} rollouts of at most {args.length} tokens, {args.size} models, "
        f"{args.pairs} pairs of {args.steps} steps; microseconds per response token"
    )
    rows = []
    for side in ("opdkit", "trl"):
        of = result[side]
        memory = of.get("memory", {"before": 0, "peak": 0})
        rows.append(
            [
                side,
                of["tokens"],
                text(of["tokens_per_second"], 0),
                *(f"{of['microseconds_per_token'][p]:.1f}" for p in (*PHASES, "other")),
                f"{of['loss']:.5f}",
                f"{memory['peak'] / 2**20:.0f}",
                f"{(memory['peak'] - memory['before']) / 2**20:.0f}",
            ]
        )
    table(
        ["side", "tokens", "tokens/s", *PHASES, "other", "loss", "peak MiB", "of the steps MiB"],
        rows,
    )
    print(
        f"opdkit / TRL, tokens per second of the whole step: {text(result['ratio'])} (median and "
        "quartiles of the pairs)"
    )


if __name__ == "__main__":
    main()
