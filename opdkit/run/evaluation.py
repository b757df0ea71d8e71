"""Evaluations while a run is going on, and what else curricula adapt to: the loss on held-out
responses, and the entropy of what the student writes to held-out prompts.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from opdkit.base.errors import UserError
from opdkit.curricula.data import given
from opdkit.curricula.entropy_length import token_mean
from opdkit.data import Prompts
from opdkit.eval import EvalResult, evaluate_model
from opdkit.objective.facts import LogpFact
from opdkit.objective.needs import Needs
from opdkit.rewards import Reward
from opdkit.run.episodes import episodic
from opdkit.run.prompts import evaluated_as, make_prompts
from opdkit.run.refuse import refuse_no_response
from opdkit.run.settings import Evaluate, Run
from opdkit.sampling import HFSampler
from opdkit.teachers import Remote, Routed, Scorer
from opdkit.teachers.views.translated import model_and_tokenizer
from opdkit.train.collect.collector import Questions
from opdkit.train.gather import gather
from opdkit.train.student import Student
from opdkit.types import AUTHORS, DataRow, Prompt, Rollout, Sampler, Sampling


@dataclass
class Evaluator:
    """Scores models on held-out problems and keeps what they wrote."""

    run: Run
    sampler: Sampler
    prompts: Prompts
    reward: Reward | None
    tokenizer: Any  # the student's

    @property
    def settings(self) -> Evaluate:
        if self.run.evaluate is None:
            raise ValueError("this run has no evaluation")
        return self.run.evaluate

    @property
    def sampling(self) -> Sampling:
        return evaluated_as(self.run, self.settings)

    @property
    def scores(self) -> bool:
        """Whether there is anything that scores an answer."""
        return self.reward is not None or self.run.held_out_world is not None

    @property
    def seed(self) -> int:
        return self.run.seed + 1

    def write(self, sampler: Sampler, step: int) -> None:
        """Answers to the held-out problems that nobody scores."""
        sampler.sample(list(self.prompts), self.sampling, seed=self.seed, step=step)

    def score(self, sampler: Sampler, name: str, step: int) -> EvalResult:
        """One evaluation, appended to evals.jsonl; its samples are kept."""
        if not self.scores:
            raise ValueError("this run has no evaluation")
        result = evaluate_model(
            sampler,
            list(self.prompts),
            self.reward,
            self.sampling,
            ks=self.settings.ks,
            seed=self.seed,
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


class Heard:
    """A sampler that is listened to: the entropy of what it wrote last, of the whole vocabulary at
    temperature 1, nats per token.

    It is a `types.Sampler`; the one inside notes entropies.
    """

    def __init__(self, inner: Sampler):
        self.inner, self.sync = inner, inner.sync
        self.entropy = math.nan

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, **settings: Any) -> Any:
        rollouts = self.inner.sample(prompts, sampling, **settings)
        self.entropy = token_mean(map(_entropies, rollouts))
        return rollouts


def _entropies(rollout: Rollout) -> tuple[float, int]:
    """The sum over the tokens that the student drew, and their number."""
    if rollout.notes is None or rollout.notes.entropy is None:
        raise UserError(
            "the curriculum goes by the entropy of held-out samples, which their sampler does not "
            "note: evaluate in this process (sampler=hf), or choose another curriculum"
        )
    drawn = torch.tensor(rollout.drawn, dtype=torch.bool)
    own = rollout.notes.entropy.double().cpu()[drawn]  # [n]
    return own.sum().item(), len(own)


@dataclass
class Measurer:
    """What is known of the student at a step: its score, and what its curriculum adapts to."""

    evaluator: Evaluator
    heard: Heard | None  # where the entropy is asked for: the evaluator's sampler
    validator: Validator | None  # where the loss is

    def __call__(self, step: int) -> dict[str, float]:
        found, evaluator = {}, self.evaluator
        if self.validator is not None:
            found["loss"] = self.validator()
        writer = self.heard or evaluator.sampler
        if evaluator.scores:
            found["score"] = evaluator.score(writer, "student", step).avg_at_k.value
        elif self.heard is not None:
            evaluator.write(writer, step)
        if self.heard is not None:
            found["entropy"] = self.heard.entropy
            print(
                f"opdkit: entropy of held-out samples at step {step}: {self.heard.entropy:.3f} "
                "nats per token",
                file=sys.stderr,
            )
        return found


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
        with local.writing():
            sampler = HFSampler(local.model, tokenizer, head=local.head)
            acting = episodic(evaluator.run.held_out_world, sampler, asked, local.model)
            replace(evaluator, prompts=asked).score(acting, name, 0)


def _by_name(scorer: Any) -> dict[str, Any]:
    """The teachers in this process by the name they are evaluated under."""
    if isinstance(scorer, Routed):
        return {f"teacher {k}": m for k, m in scorer.teachers.items()}
    return {"teacher": scorer}
