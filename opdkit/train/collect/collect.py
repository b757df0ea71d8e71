"""A step's rollouts: written by the run's writer, scored and passed through its filters; and noted
on by its annotators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from opdkit.annotators import AnnotateContext, Annotator
from opdkit.base.clock import Clock
from opdkit.curricula import Ask, Memory, StepContext, writer_of
from opdkit.curricula.recall import Tick
from opdkit.curricula.writer import nobody, nothing_stored
from opdkit.rewards import Reward, score
from opdkit.train.collect.collector import Collector
from opdkit.train.collect.filters import Draw, Filter
from opdkit.train.mesh import Mesh
from opdkit.train.student import Student
from opdkit.types import Prompt, Rollout, Sampler, Sampling


@dataclass(frozen=True)
class Collected:
    """What a step has to learn from."""

    rollouts: list[Rollout]  # with their rewards and marks
    scored: list[Rollout]  # those that filters dropped too, as they were before any filter
    tokens: int  # that the student wrote for them, and for rollouts that filters dropped
    earlier: frozenset[str] = frozenset()  # the ids of those that were written at earlier steps
    version: int = 0  # optimiser steps that the student had taken when they were asked for
    stream: dict[str, Any] = field(default_factory=dict)  # position in the data behind them
    counts: dict[str, float] = field(default_factory=dict)  # metrics of what filters kept


def prepare(collector: Collector, student: Student, memory: Memory) -> Memory:
    """Memory before the first step, once the curriculum has asked what it has to know."""

    def sample(which: Sequence[int], each: int, first: int, tick: Tick) -> list[Rollout]:
        rollouts = collector.sampler.sample(
            [replace(collector.prompts[i], number=first) for i in which],
            replace(collector.sampling, num_generations=each),
            seed=collector.seed,
            step=None,
            policy_version=student.updates,
            progress=tick,
        )
        if collector.reward is None:
            return rollouts
        return _rewarded(rollouts, collector.reward, collector.mesh)

    return collector.curriculum.prepared(Ask(collector.questions, sample), memory)


def collect(
    collector: Collector,
    version: int,
    clock: Clock,
    *,
    step: int,
    total_steps: int,
    memory: Memory,
) -> Collected:
    """The rollouts of step number `step` (from 0) of `total_steps`, by a student that has taken
    `version` optimiser steps: written, scored and passed through the filters.
    """
    pen = _Pen(collector, step, version, collector.told(step, total_steps))
    every: list[Rollout] = []
    count, sampling = collector.prompts_per_step, collector.cut(memory)
    recalled = collector.curriculum.recalled(count, step, collector.seed, memory)
    again = list(recalled.instead)  # until the first drawing, of which they are a part
    batches = collector.batches(step, memory, count - len({r.group for r in again}))

    def scored() -> list[Rollout]:
        """Rollouts of the next prompts, with rewards."""
        taken = next(batches)
        with clock("sample"):
            context = StepContext(
                sampling=sampling,
                step=step,
                total_steps=total_steps,
                seed=collector.seed,
                sample=pen.sample,
                sample_as=pen.sample_as,
                memory=memory,
                policy_version=version,
                **_questions(collector, taken),
            )
            rollouts = writer_of(collector.curriculum).write(context)
        with clock("reward"):
            if collector.reward is not None:
                rollouts = _rewarded(rollouts, collector.reward, collector.mesh)
        every.extend(rollouts)
        rollouts, again[:] = rollouts + again, []
        return rollouts

    rollouts = [*_filtered(collector.filters, scored), *recalled.beside]
    return Collected(
        rollouts,
        every,
        tokens=sum(sum(r.drawn) for r in pen.written),
        earlier=frozenset(r.id for r in (*recalled.instead, *recalled.beside)),
        version=version,
        stream=collector.stream.state(),
        counts=collector.counts(),
    )


def annotate(
    collector: Collector, rollouts: list[Rollout], told: AnnotateContext, mesh: Mesh
) -> tuple[list[Rollout], dict[str, Any]]:
    """Rollouts once the annotators have noted on them, and what they add to the run's memory."""
    if not collector.annotators:
        return rollouts, {}
    return mesh.same(_annotated(collector.annotators, rollouts, told))


def _rewarded(rollouts: Sequence[Rollout], reward: Reward, mesh: Mesh) -> list[Rollout]:
    """Rollouts with rewards, those of a group found by one process."""
    groups = [list(of) for _, of in groupby(rollouts, key=lambda rollout: rollout.group)]

    def found(mine: Sequence[list[Rollout]]) -> list[list[Rollout]]:
        scored = iter(score([rollout for group in mine for rollout in group], reward))
        return [[next(scored) for _ in group] for group in mine]

    return [rollout for group in mesh.divided(groups, found) for rollout in group]


def _questions(collector: Collector, taken: Sequence[int]) -> dict[str, Any]:
    """What a writer is told of the prompts that a step asks, by their numbers."""
    prompts = collector.prompts
    at = {prompts[i].id: i for i in taken}
    return {
        "prompts": tuple(prompts[i] for i in taken),
        "reference": lambda prompt: prompts.response_tokens(at[prompt.id]),
        "viewed": collector.viewed,
        "turns": lambda prompt: prompts.turns(at[prompt.id]),
        "pair": lambda prompt: prompts.pair(at[prompt.id]),
        "stored": nothing_stored if collector.stored is None else collector.stored.rollouts,
    }


def _filtered(filters: Sequence[Filter], draw: Draw) -> list[Rollout]:
    """Rollouts of the next prompts that have passed these filters, each of which may ask the ones
    before it for more.
    """
    if not filters:
        return draw()
    *before, last = filters
    return last(_filtered(before, draw), lambda: _filtered(before, draw))


def _annotated(
    annotators: Sequence[Annotator], rollouts: list[Rollout], told: AnnotateContext
) -> tuple[list[Rollout], dict[str, Any]]:
    """Rollouts once each annotator has noted on them, and what they add to the run's memory."""
    added: dict[str, Any] = {}
    for annotator in annotators:
        now = replace(told, memory={**told.memory, **added})
        rollouts, more = annotator.annotate(rollouts, now)
        added |= more
    return rollouts, added


@dataclass
class _Pen:
    """What lets the student write the responses of a step; one to a prompt that is asked again is
    another response.
    """

    collector: Collector
    step: int
    version: int
    told: dict[str, Any]  # to the student's sampler besides
    written: list[Rollout] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)  # responses to each prompt so far

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        made = self._made(self.collector.sampler, prompts, sampling, **self.told)
        self.written.extend(made)
        return made

    def sample_as(self, model: str, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        if model not in self.collector.players:
            return nobody(model, prompts, sampling)
        return self._made(self.collector.players[model], prompts, sampling)

    def _made(
        self, sampler: Sampler, prompts: Sequence[Prompt], sampling: Sampling, **told: Any
    ) -> list[Rollout]:
        return sampler.sample(
            [self._numbered(prompt, sampling.num_generations) for prompt in prompts],
            sampling,
            seed=self.collector.seed,
            step=self.step,
            policy_version=self.version,
            **told,
        )

    def _numbered(self, prompt: Prompt, count: int) -> Prompt:
        self.asked[prompt.id] += count
        return replace(prompt, number=self.asked[prompt.id] - count)
