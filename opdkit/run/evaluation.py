"""Evaluations while a run is going on, and the loss on held-out responses for curricula that adapt
to it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

from opdkit.base.errors import UserError
from opdkit.data import Prompts
from opdkit.eval import EvalResult, evaluate_model
from opdkit.objective.facts import LogpFact
from opdkit.objective.needs import Needs
from opdkit.rewards import Reward
from opdkit.run.settings import Run
from opdkit.sampling import HFSampler
from opdkit.train.collect.sources import given
from opdkit.train.gather import gather
from opdkit.train.job import Job
from opdkit.train.student import Student


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
        sampling = replace(
            settings.sampling or self.run.sampling, num_generations=settings.num_generations
        )
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
        print(
            f"opdkit: {name} at step {step}: {result.avg_at_k.value:.3f} [{low:.3f}, {high:.3f}]",
            file=sys.stderr,
        )
        return result


@dataclass
class Validator:
    """Mean negative log-likelihood of the first held-out reference responses under the student,
    nats per token.
    """

    job: Job
    prompts: Prompts
    count: int = 64

    def __call__(self) -> float:
        asked = [i for i in range(len(self.prompts)) if self.prompts.response_tokens(i)][
            : self.count
        ]
        if not asked:
            raise UserError(
                "this method adapts to the loss on held-out reference responses, and the data has "
                "none: add a column `response` to the evaluation set, or to the training set where "
                "there is no evaluation"
            )
        rollouts = [
            given(replace(self.job, prompts=self.prompts), self.prompts[i], i, f"validation/{i}")
            for i in asked
        ]
        with self.job.student.autocast():
            batch = gather(
                rollouts,
                Needs(frozenset({LogpFact("student")})),
                self.job.scorers,
                device=self.job.student.device,
            )
        return -batch["student"].logp[batch.mask].mean().item()
