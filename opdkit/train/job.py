"""A run with everything built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.curricula import Curriculum, Plain
from opdkit.objective.grammar import Objective
from opdkit.objective.needs import Needs
from opdkit.rewards import Reward
from opdkit.teachers import Remote, Scorer
from opdkit.train.checkpoint import State
from opdkit.train.collect.collector import Questions, Sampler, Stored
from opdkit.train.record import Recorder
from opdkit.train.settings import Checkpoint, Optim
from opdkit.train.student import Student
from opdkit.types import Sampling


@dataclass
class Job:
    """A run with everything built: what `run.build.prepare` hands to `train`."""

    objective: Objective
    needs: Needs
    student: Student
    sampler: Sampler
    # "student" as it is now, and every model the objective reads
    scorers: Mapping[str, Scorer | Remote]
    prompts: Questions
    stream: Any  # data.PromptStream
    sampling: Sampling
    folder: Path
    tokenizer: Any
    recorder: Recorder
    steps: int
    prompts_per_step: int
    optim: Optim
    checkpoint: Checkpoint
    micro_batch_tokens: int
    max_tokens: int | None = None  # that the student writes, after which the run ends
    seed: int = 0
    reward: Reward | None = None
    curriculum: Curriculum = Plain()
    stored: Stored | None = None  # where the curriculum reads its rollouts from a cache
    dynamic_sampling: bool = False
    overlong_margin: int | None = None
    recompute_student: bool = False
    correct_sampling: bool = False
    # tokens whose text ends a line, where the objective reads their mark
    newlines: frozenset[int] = frozenset()
    evaluate: Callable[[int], float] | None = None  # step -> score
    # loss on held-out reference responses, for curricula that want it
    validate: Callable[[], float] | None = None
    evaluate_every: int = 0
    term_gradients_every: int = 0

    def ended(self, state: State) -> bool:
        """Whether the last step is done."""
        return state.step >= self.steps or (
            self.max_tokens is not None and state.tokens >= self.max_tokens
        )

    def expected_steps(self, state: State) -> int:
        """Steps the run will have taken at its end: what schedules are laid out for.

        With `max_tokens`, by the tokens a step took so far.
        """
        if self.max_tokens is None or not state.step or not state.tokens:
            return self.steps
        return min(
            self.steps, max(state.step + 1, round(state.step * self.max_tokens / state.tokens))
        )
