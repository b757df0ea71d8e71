"""A step's rollouts: written by the run's writer, scored, passed through its filters, and noted on
by its annotators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opdkit.annotators import AnnotateContext, Annotator
from opdkit.base.clock import Clock
from opdkit.curricula import Memory, StepContext
from opdkit.curricula.writer import nothing_stored
from opdkit.rewards import score
from opdkit.train.collect.collector import Collector
from opdkit.train.collect.filters import Draw, Filter
from opdkit.train.student import Student
from opdkit.types import Prompt, Rollout, Sampling


@dataclass
class Collected:
    """What a step has to learn from."""

    rollouts: list[Rollout]  # with their rewards and marks
    tokens: int  # that the student wrote for them, and for rollouts that filters dropped
    memory: dict[str, Any] = field(default_factory=dict)  # what annotators add to the run's


def collect(
    collector: Collector,
    student: Student,
    clock: Clock,
    *,
    step: int,
    total_steps: int,
    memory: Memory,
) -> Collected:
    """The rollouts of step number `step` (from 0) of `total_steps`."""
    written: list[Rollout] = []
    asked: Counter[str] = Counter()  # responses to each prompt so far

    def numbered(prompt: Prompt, count: int) -> Prompt:
        asked[prompt.id] += count
        return replace(prompt, number=asked[prompt.id] - count)

    def sample(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        made = collector.sampler.sample(
            [numbered(prompt, sampling.num_generations) for prompt in prompts],
            sampling,
            seed=collector.seed,
            step=step,
            policy_version=student.updates,
        )
        written.extend(made)
        return made

    def scored() -> list[Rollout]:
        """Rollouts of the next prompts, with rewards."""
        taken = collector.stream.take(collector.prompts_per_step)
        at = {collector.prompts[i].id: i for i in taken}
        with clock("sample"):
            context = StepContext(
                prompts=tuple(collector.prompts[i] for i in taken),
                sampling=collector.sampling,
                step=step,
                total_steps=total_steps,
                seed=collector.seed,
                sample=sample,
                reference=lambda prompt: collector.prompts.response_tokens(at[prompt.id]),
                viewed=collector.viewed,
                stored=nothing_stored if collector.stored is None else collector.stored.rollouts,
                memory=memory,
                policy_version=student.updates,
            )
            rollouts = collector.writer.write(context)
        with clock("reward"):
            return rollouts if collector.reward is None else score(rollouts, collector.reward)

    told = AnnotateContext(step, collector.seed, student.updates, memory)
    return _annotated(
        collector.annotators, _filtered(collector.filters, scored), written, told, clock
    )


def _filtered(filters: Sequence[Filter], draw: Draw) -> list[Rollout]:
    """Rollouts of the next prompts that have passed these filters, each of which may ask the ones
    before it for more.
    """
    if not filters:
        return draw()
    *before, last = filters
    return last(_filtered(before, draw), lambda: _filtered(before, draw))


def _annotated(
    annotators: Sequence[Annotator],
    rollouts: list[Rollout],
    written: Sequence[Rollout],
    told: AnnotateContext,
    clock: Clock,
) -> Collected:
    """Rollouts once each annotator has noted on them, and what was written for them in all."""
    added: dict[str, Any] = {}
    for annotator in annotators:
        with clock("annotate"):
            now = replace(told, memory={**told.memory, **added})
            rollouts, more = annotator.annotate(rollouts, now)
            added |= more
    return Collected(rollouts, sum(sum(r.drawn) for r in written), added)
