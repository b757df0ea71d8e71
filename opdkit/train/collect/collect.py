"""A step's rollouts: planned by the curriculum, written by the student or read, scored, and
replaced where they teach nothing.
"""

from __future__ import annotations

from dataclasses import replace

from opdkit.base.clock import Clock
from opdkit.base.errors import UserError
from opdkit.rewards import score
from opdkit.train.checkpoint import State
from opdkit.train.collect.filters import informative, shape_overlong
from opdkit.train.collect.sources import written
from opdkit.train.job import Job
from opdkit.types import Rollout

ROUNDS = 16  # of dynamic sampling, before it gives up


def collect(job: Job, state: State, clock: Clock) -> list[Rollout]:
    """The step's rollouts with their rewards and marks; counts the tokens that the student writes,
    also of rollouts it drops.
    """
    wanted, total_steps = min(job.prompts_per_step, len(job.prompts)), job.expected_steps(state)
    rollouts = _scored(job, state, clock, total_steps, wanted)
    if job.dynamic_sampling:
        rollouts = informative(rollouts)
        rounds = 1
        while (found := len({r.group for r in rollouts})) < wanted:
            if rounds == ROUNDS:
                raise UserError(
                    f"dynamic sampling found {found} prompts of {wanted} with both right and wrong "
                    f"responses in {rounds * wanted}: the data is too easy or too hard for this "
                    "student, or num_generations too small. Change one of them, or "
                    "dynamic_sampling=false"
                )
            known = {r.group for r in rollouts}
            rollouts += [
                r
                for r in informative(_scored(job, state, clock, total_steps, wanted))
                if r.group not in known
            ]
            rounds += 1
        keep = list(dict.fromkeys(r.group for r in rollouts))[:wanted]
        rollouts = [r for r in rollouts if r.group in keep]
    if job.overlong_margin is not None:
        rollouts = shape_overlong(rollouts, job.sampling.max_completion_length, job.overlong_margin)
    if job.newlines:
        rollouts = [
            replace(r, marks={**r.marks, "newline": [t in job.newlines for t in r.tokens]})
            for r in rollouts
        ]
    return rollouts


def _scored(job: Job, state: State, clock: Clock, total_steps: int, count: int) -> list[Rollout]:
    """Rollouts of the next prompts, with rewards."""
    prompts = {job.prompts[i].id: i for i in job.stream.take(count)}
    with clock("sample"), job.student.autocast():
        rollouts = written(job, state, total_steps, prompts)
    with clock("reward"):
        return rollouts if job.reward is None else score(rollouts, job.reward)
