"""What a person sees while a run is going on: evaluations and a line per step."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from opdkit.data import Prompts
from opdkit.errors import UserError
from opdkit.eval import EvalResult, evaluate_model
from opdkit.facts import Needs
from opdkit.progress import duration
from opdkit.rewards import Reward
from opdkit.run import Run
from opdkit.sampling import HFSampler
from opdkit.train.collect import given
from opdkit.train.gather import gather
from opdkit.train.job import Job
from opdkit.train.student import Student
from opdkit.types import LogpFact


@dataclass
class Evaluator:
    """Scores models on held-out problems and keeps what they wrote."""

    run: Run
    sampler: HFSampler
    prompts: Prompts
    reward: Reward | None
    trained: Student

    def student_score(self, step: int) -> float:
        with self.trained.autocast():
            return self.score(self.sampler, "student", step).avg_at_k.value

    def score(self, sampler: HFSampler, name: str, step: int) -> EvalResult:
        """One evaluation, appended to evals.jsonl; its samples are kept."""
        settings = self.run.evaluate
        if settings is None or self.reward is None:
            raise ValueError("this run has no evaluation")
        sampling = replace(settings.sampling or self.run.sampling, num_generations=settings.num_generations)
        result = evaluate_model(
            sampler,
            list(self.prompts),
            self.reward,
            sampling,
            ks=settings.ks,
            seed=self.run.seed + 1,
            name=name,
            step=step,
            keep=self.run.folder / "samples" / f"eval_{name}_{step:06d}.jsonl",
        )
        with (self.run.folder / "evals.jsonl").open("a") as handle:
            handle.write(json.dumps(result.to_dict()) + "\n")
        low, high = result.avg_at_k.interval.low, result.avg_at_k.interval.high
        print(f"opdkit: {name} at step {step}: {result.avg_at_k.value:.3f} [{low:.3f}, {high:.3f}]", file=sys.stderr)
        return result


@dataclass
class Validator:
    """Mean negative log-likelihood of the first held-out reference responses under the student, nats per token."""

    job: Job
    prompts: Prompts
    count: int = 64

    def __call__(self) -> float:
        asked = [i for i in range(len(self.prompts)) if self.prompts.response_tokens(i)][: self.count]
        if not asked:
            raise UserError(
                "this method adapts to the loss on held-out reference responses, and the data has none: add a column `response` to the "
                "evaluation set, or to the training set where there is no evaluation"
            )
        rollouts = [given(replace(self.job, prompts=self.prompts), self.prompts[i], i, f"validation/{i}") for i in asked]
        with self.job.student.autocast():
            batch = gather(rollouts, Needs(frozenset({LogpFact("student")})), self.job.scorers, device=self.job.student.device)
        return -batch["student"].logp[batch.mask].mean().item()


@dataclass
class Screen:
    """A line per step, at most one every two seconds, with rate and time left."""

    steps: int
    first: int
    max_tokens: int | None = None
    first_tokens: int = 0
    every: float = 2.0

    def __post_init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self.last < self.every and step not in (self.first + 1, self.steps):
            return
        self.last = now
        done = (step - self.first) / (self.steps - self.first)
        words = [f"step {step}/{self.steps}"]
        if self.max_tokens is not None:  # whichever ends first
            tokens = metrics["tokens/sampled_so_far"]
            done = max(done, (tokens - self.first_tokens) / (self.max_tokens - self.first_tokens))
            words = [f"step {step}", f"{min(tokens / self.max_tokens, 1):.0%} of {self.max_tokens:,} tokens"]
        left = (now - self.start) * max(1 / done - 1, 0)
        for label, key in (
            ("loss", "loss"),
            ("KL", "teacher_kl/sampled"),
            ("reward", "reward/mean"),
            ("length", "completions/mean_length"),
        ):
            if key in metrics and math.isfinite(metrics[key]):
                words.append(f"{label} {metrics[key]:.3g}")
        words += [f"{metrics['tokens_per_second/step']:,.0f} tokens/s", f"{duration(left)} left"]
        print("  ".join(words), file=sys.stderr)
