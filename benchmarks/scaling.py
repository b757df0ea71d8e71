"""How the cost of a training step grows with rollouts, length, vocabulary, group size and number of
terms.

One thing is varied at a time, on a tiny student and teacher whose responses all reach the limit.
Sizes are visited in turn, round after round; an exponent is the slope of log(median seconds) over
log(what is varied), of the whole step and of each phase; between the two largest sizes fixed costs
count least. Long responses are a sweep of their own: there attention, which is quadratic, is the
larger part of a tiny model.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    alternate,
    begin,
    parser,
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

from opdkit.methods.method import as_method
from opdkit.objective.grammar import Objective
from opdkit.objective.losses import Divergence, PolicyGradient
from opdkit.objective.signals import LogRatio
from opdkit.run.build import prepare
from opdkit.run.open import Given
from opdkit.run.settings import make_run
from opdkit.train.loop import train_step

PHASES = ("sample", "score", "learn")
BASE = Objective(Divergence("reverse_kl"))
TERMS = {
    "reverse KL": BASE,
    "+ forward KL": BASE + 0.5 * Divergence("forward_kl"),
    "+ forward KL + policy gradient": BASE
    + 0.5 * Divergence("forward_kl")
    + 0.1 * PolicyGradient(LogRatio("teacher", "student")),
}


class Steps:
    """A run whose steps can be taken one at a time."""

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        objective: Objective,
        rollouts: int,
        length: int,
        vocab: int,
        group: int,
    ):
        torch.manual_seed(args.seed)
        with torch.device(args.device):
            student, teacher = (
                stopping(qwen3(args.hidden, 2, vocab, initial=0.05), 0.0) for _ in range(2)
            )
        run = make_run(
            {
                "student": "student",
                "teacher": "teacher",
                "data": "in memory",
                "output": str(folder / str(time.perf_counter_ns())),
                "steps": 10**3,
                "prompts_per_step": rollouts // group,
                "sampling": {"num_generations": group, "max_completion_length": length},
                "optim": {"learning_rate": 1e-6},
                "dtype": "bfloat16" if args.device.startswith("cuda") else "float32",
                "device": args.device,
                "keep_samples": 0,
                "seed": args.seed,
            }
        )
        run.folder.mkdir(parents=True)
        rows = [
            {"id": str(i), "prompt": q}
            for i, q in enumerate(questions(rollouts // group, vocab, args.seed, 8, 8))
        ]
        given = Given(
            student=student,
            teacher=teacher,
            tokenizer=tokenizer(vocab),
            rows=rows,
            method=as_method(objective),
        )
        self.job, self.state = prepare(run, given)
        self.metrics: list[dict[str, float]] = []
        self.job.recorder.show = lambda step, metrics: self.metrics.append(dict(metrics))
        self.device, self.tokens = args.device, rollouts * length

    def __call__(self) -> dict[str, float]:
        """Seconds of one step and of its phases."""
        before, start = self.state.tokens, time.perf_counter()
        train_step(self.job, self.state)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        if self.state.tokens - before != self.tokens:
            raise AssertionError(
                f"a step wrote {self.state.tokens - before} tokens, not {self.tokens}"
            )
        return {
            "step": seconds,
            **{phase: self.metrics[-1][f"seconds/{phase}"] for phase in PHASES},
        }


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least-squares slope of log seconds over log size."""
    return statistics.linear_regression(
        [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    ).slope


def sweep(
    args: argparse.Namespace, title: str, name: str, values: Sequence[int], **fixed: int
) -> dict[str, Any]:
    """Cost over one quantity, all others fixed."""
    base = {
        "rollouts": args.rollouts,
        "length": args.length,
        "vocab": args.vocab,
        "group": 1,
    } | fixed
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            str(value): Steps(args, Path(folder), objective=BASE, **(base | {name: value}))
            for value in values
        }
        results = alternate(sides, args.rounds)
    medians = {
        phase: [statistics.median(r[phase] for r in results[str(v)]) for v in values]
        for phase in ("step", *PHASES)
    }
    return {
        "vary": title,
        "fixed": {k: v for k, v in base.items() if k != name},
        "values": list(values),
        "tokens": [side.tokens for side in sides.values()],
        "seconds": medians,
        "exponent": {phase: exponent(values, of) for phase, of in medians.items()},
        "exponent_at_the_end": exponent(values[-2:], medians["step"][-2:]),
    }


def terms(args: argparse.Namespace) -> dict[str, Any]:
    """Cost of a second and a third term, in pairs with the step before it was added."""
    with tempfile.TemporaryDirectory() as folder:
        of = (args.rollouts, args.length, args.vocab, 1)
        sides = {
            name: Steps(args, Path(folder), objective, *of) for name, objective in TERMS.items()
        }
        results = alternate(sides, args.term_rounds)
    names = list(TERMS)
    out: dict[str, Any] = {
        name: {p: spread([r[p] for r in results[name]]) for p in ("step", "learn")}
        for name in names
    }
    for name, before in zip(names[1:], names):
        out[name]["over_previous"] = {
            p: ratios([r[p] for r in results[name]], [r[p] for r in results[before]])
            for p in ("step", "learn")
        }
    return out


def steps(first: int, last: int) -> list[int]:
    """first, 4 first, 16 first ... up to last."""
    return [first * 4**i for i in range(int(math.log(last / first, 4) + 1e-9) + 1)]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--rollouts", type=int, default=64, help="where they are not varied")
    options.add_argument(
        "--length", type=int, default=64, help="of every response, where it is not varied"
    )
    options.add_argument("--vocab", type=int, default=1024, help="where it is not varied")
    options.add_argument(
        "--most-tokens", type=int, default=1 << 16, help="response tokens of the largest step"
    )
    options.add_argument("--most-vocab", type=int, default=1 << 15)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--term-rounds", type=int, default=9)
    args = options.parse_args(argv)
    begin(args)
    most = args.most_tokens
    sweeps = [
        sweep(args, "rollouts", "rollouts", steps(args.rollouts // 4, most // args.length)),
        sweep(
            args,
            "length",
            "length",
            steps(args.length // 4, 4 * args.length),
            rollouts=most // (4 * args.length),
        ),
        sweep(args, "long responses", "length", steps(args.length, most // args.rollouts)),
        sweep(args, "vocabulary", "vocab", steps(args.vocab // 2, args.most_vocab)),
        sweep(args, "group", "group", steps(1, min(16, args.rollouts))),
    ]
    counted = terms(args)
    report(sweeps, counted)
    return save("scaling", args, {"sweeps": sweeps, "terms": counted})


def report(sweeps: list[dict[str, Any]], counted: dict[str, Any]) -> None:
    rows = []
    for of in sweeps:
        for i, value in enumerate(of["values"]):
            rows.append(
                [
                    of["vary"],
                    value,
                    of["tokens"][i],
                    *(f"{of['seconds'][p][i]:.3f}" for p in ("step", *PHASES)),
                ]
            )
        end = f"at the end: {of['exponent_at_the_end']:.2f}"
        rows.append(
            [of["vary"], "exponent", end, *(f"{of['exponent'][p]:.2f}" for p in ("step", *PHASES))]
        )
    table(["vary", "value", "tokens", "step s", *PHASES], rows)
    print()
    rows = []
    for name, of in counted.items():
        over = of.get("over_previous")
        rows.append(
            [
                name,
                *(text(of[p], 3) for p in ("step", "learn")),
                *(text(over[p], 3) if over else "" for p in ("step", "learn")),
            ]
        )
    table(["terms", "step s", "learn s", "step / previous", "learn / previous"], rows)


if __name__ == "__main__":
    main()
