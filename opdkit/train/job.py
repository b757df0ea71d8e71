"""A run with everything built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from opdkit.curricula import Curriculum
from opdkit.objective.companion import Companions
from opdkit.objective.grammar import Objective
from opdkit.objective.needs import Needs, idle, needs
from opdkit.teachers import Remote, Scorer
from opdkit.train.checkpoint import State
from opdkit.train.collect.ahead import Queue
from opdkit.train.collect.collector import Collector
from opdkit.train.mesh import ALONE, Mesh
from opdkit.train.record import Recorder
from opdkit.train.saver import Saver
from opdkit.train.settings import Checkpoint
from opdkit.train.student import Student


@dataclass(frozen=True)
class Length:
    """When a run ends: after `steps`, or at the first step by which the student has written
    `max_tokens`.
    """

    steps: int
    max_tokens: int | None = None

    def ended(self, state: State) -> bool:
        """Whether the last step is done."""
        return state.step >= self.steps or (
            self.max_tokens is not None and state.tokens >= self.max_tokens
        )

    def expected_steps(self, state: State) -> int:
        """Steps the run will have taken at its end: what schedules are laid out for.

        With `max_tokens`, by the tokens a step took so far.
        """
        if self.ended(state):
            return state.step
        if self.max_tokens is None or not state.step or not state.tokens:
            return self.steps
        return min(
            self.steps, max(state.step + 1, round(state.step * self.max_tokens / state.tokens))
        )


@dataclass(frozen=True)
class Scoring:
    """How rollouts are scored by the student that learns from them (see `train.gather`)."""

    recompute_student: bool = False  # with the trainer, whatever the sampler said
    correct_sampling: bool = False  # ratios to the distribution that tokens were drawn from


@dataclass(frozen=True)
class HeldOut:
    """What held-out data is used for: before the first step, every so many, after the last."""

    every: int = 0  # steps; 0: only before and after
    # of the student at a step: "score", of which the best is kept, and what the curriculum adapts
    # to, "loss" and "entropy"; None where there is no such data
    measure: Callable[[int], Mapping[str, float]] | None = None
    by_writer: bool = False  # whether the sampler of the run answers, which is then to be at rest


@dataclass
class Job:
    """A run with everything built: what `run.build.prepare` hands to `train`."""

    objective: Objective
    queue: Queue  # where rollouts come from
    student: Student
    # "student" as it is now, and every model the objective reads
    scorers: Mapping[str, Scorer | Remote]
    recorder: Recorder
    folder: Path
    tokenizer: Any
    length: Length
    checkpoint: Checkpoint
    micro_batch_tokens: int
    companions: Companions = field(default_factory=Companions)  # what stands beside the student
    scoring: Scoring = Scoring()
    held_out: HeldOut = HeldOut()
    mesh: Mesh = ALONE  # the processes that share the run
    seed: int = 0
    # is told that there is something to continue from, though no step is done yet
    begun: Callable[[], object] = lambda: None

    @property
    def collector(self) -> Collector:
        """What writes rollouts."""
        return self.queue.collector

    @property
    def curriculum(self) -> Curriculum:
        """What is remembered of rollouts and evaluations."""
        return self.collector.curriculum

    def passes(self, step: int, total_steps: int) -> int:
        """How often step number `step` (from 0) of `total_steps` goes through its rollouts."""
        return self.curriculum.passes(step, total_steps) or self.student.optim.passes

    @cached_property
    def saver(self) -> Saver:
        """What writes its checkpoints."""
        parts = self.student, self.tokenizer, self.companions, self.checkpoint, self.mesh
        return Saver(self.folder, *parts)

    @cached_property
    def needs(self) -> Needs:
        """What the objective reads."""
        return needs(self.objective)

    def needs_at(self, step: int, total_steps: int) -> Needs:
        """What it reads at a step: nothing of terms that weigh nothing then, so that a model which
        they alone read makes no pass.
        """
        return needs(self.objective, idle(self.objective, step, total_steps))
