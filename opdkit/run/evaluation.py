"""Evaluations while a run is going on, and the loss on held-out responses for curricula that adapt
to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from opdkit.curricula.data import given
from opdkit.data import Prompts
from opdkit.eval import EvalResult, evaluate_model
from opdkit.objective.facts import LogpFact
from opdkit.objective.needs import Needs
from opdkit.rewards import Reward
from opdkit.run.episodes import episodic
from opdkit.run.prompts import make_prompts
from opdkit.run.refuse import refuse_no_response
from opdkit.run.settings import Run
from opdkit.sampling import HFSampler
from opdkit.teachers import Remote, Routed, Scorer
from opdkit.teachers.views.translated import model_and_tokenizer
from opdkit.train.collect.collector import Questions
from opdkit.train.gather import gather
from opdkit.train.student import Student
from opdkit.types import AUTHORS, DataRow, Sampler


@dataclass
class Evaluator:
    """Scores models on held-out problems and keeps what they wrote."""

    run: Run
    sampler: Sampler
    prompts: Prompts
    reward: Reward | None
    tokenizer: Any  # the student's

    def student_score(self, step: int) -> float:
        return self.score(self.sampler, "student", step).avg_at_k.value

    def score(self, sampler: Sampler, name: str, step: int) -> EvalResult:
        """One evaluation, appended to evals.jsonl; its samples are kept."""
        settings = self.run.evaluate
        if settings is None or (self.reward is None and self.run.held_out_world is None):
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

    student: Student
    scorer: Scorer | Remote  # the student as it is now
    prompts: Questions
    max_completion_length: int
    count: int = 64

    def __call__(self) -> float:
        responses = ((i, self.prompts.response_tokens(i)) for i in range(len(self.prompts)))
        asked = list(islice(((i, response) for i, response in responses if response), self.count))
        refuse_no_response(asked)
        rollouts = [
            given(self.prompts[i], response, self.max_completion_length, f"validation/{i}")
            for i, response in asked
        ]
        batch = gather(
            rollouts,
            Needs(frozenset({LogpFact("student")}), AUTHORS),
            {"student": self.scorer},
            device=self.student.device,
        )
        return -batch["student"].logp[batch.trained].mean().item()


def score_teachers(
    evaluator: Evaluator, scorers: Mapping[str, Scorer | Remote], rows: list[DataRow]
) -> None:
    """Where the run evaluates its teachers too: their own scores on the held-out problems `rows`,
    each asked in its own tokens.
    """
    settings = evaluator.run.evaluate
    if settings is None or not settings.teacher:
        return
    for name, teacher in _by_name(scorers["teacher"]).items():
        local, theirs = model_and_tokenizer(teacher)
        asked, tokenizer = evaluator.prompts, evaluator.tokenizer
        if theirs is not None:
            asked, tokenizer = make_prompts(settings.prompts, rows, theirs), theirs
        with local.around():
            sampler = HFSampler(local.model, tokenizer, head=local.head)
            acting = episodic(evaluator.run.held_out_world, sampler, asked, local.model)
            replace(evaluator, prompts=asked).score(acting, name, 0)


def _by_name(scorer: Any) -> dict[str, Any]:
    """The teachers in this process by the name they are evaluated under."""
    if isinstance(scorer, Routed):
        return {f"teacher {k}": m for k, m in scorer.teachers.items()}
    return {"teacher": scorer}
