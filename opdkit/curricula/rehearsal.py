"""Rehearsal: what the student could do at the start is written down before the first step, and had
again a little at a time while it learns the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from opdkit.base.errors import UserError
from opdkit.base.progress import progress
from opdkit.base.rules import Rules, at_least, follow
from opdkit.curricula.base import Plain
from opdkit.curricula.pass_rate import outcomes
from opdkit.curricula.recall import Ask, Recalled, Tick, again, kept
from opdkit.curricula.writer import Memory
from opdkit.objective.maths import keyed_uniform
from opdkit.types import Rollout, row_keys

REHEARSAL = "rehearsal"  # the mark of its rollouts, and its entry in the memory
AT_ONCE = 64  # prompts that are asked together, so that not all responses are held at once
PER_PROMPT = 2  # rehearsed responses per prompt of a step, where nothing is said
RULES: Rules = {
    "samples": at_least(1, "it is how many responses show whether a prompt is mastered"),
    "enough": at_least(1, "it is how many of them must be right"),
    "rehearsed": at_least(1, "it is how many stored responses a step has", "two per prompt"),
}


@dataclass(frozen=True)
class Rehearsal(Plain):
    """DPH-RL (arXiv 2509.07430): prompts that the student has mastered at the start are not asked
    in training; one right response to each, as it wrote it then, is had again now and then.

    Before the first step the student writes `samples` responses to every prompt. Of those with at
    least `enough` right ones it writes one more: where that is right too, it is stored with its
    log-probs. All other prompts are asked in training, those without any right response not if
    `drop_unsolved`. A step has, beside its prompts, a slice of at most `rehearsed` stored responses
    (None: two per prompt of the step), marked "rehearsal", each a group of its own: the store is
    gone through in slices of one size, give or take one, and shuffled anew behind the last, keyed
    by the seed. No filter sees them, and what is
    remembered of prompts does not count them.

    Memory is plain JSON: rehearsal, with pool (rollouts as dicts), explore (the questions that are
    asked) and tokens (that the student wrote for it, which are not among the run's).
    """

    kind: ClassVar[str] = REHEARSAL
    needs_own: ClassVar[bool] = True
    samples: int = 8
    enough: int = 6
    rehearsed: int | None = None
    drop_unsolved: bool = False

    def __post_init__(self) -> None:
        follow(RULES, self)
        if self.enough > self.samples:
            raise ValueError(
                f"enough={self.enough} must be at most samples={self.samples}: it is how many of "
                "these responses must be right, and no prompt would have as many"
            )

    @property
    def recalls(self) -> bool:
        return True

    @property
    def marks(self) -> frozenset[str]:
        return frozenset({REHEARSAL})

    def prepared(self, ask: Ask, memory: Memory) -> Memory:
        if REHEARSAL in memory:
            return memory
        every, right, tokens = range(len(ask.questions)), [0] * len(ask.questions), 0
        for part, rollouts in _written(ask, every, self.samples, 0, "Sampling every prompt"):
            solved = outcomes(rollouts)
            for i in part:
                right[i] = sum(solved.get(ask.questions[i], ()))
            tokens += sum(sum(r.drawn) for r in rollouts)
        mastered = [i for i in every if right[i] >= self.enough]
        pool: dict[str, dict[str, Any]] = {}
        what = "Sampling what is rehearsed"
        for _, rollouts in _written(ask, mastered, 1, self.samples, what):
            tokens += sum(sum(r.drawn) for r in rollouts)
            solved = outcomes(rollouts)
            pool |= {r.question: kept(_rehearsed(r)) for r in rollouts if any(solved[r.question])}
        some = {q for q, n in zip(ask.questions, right) if n or not self.drop_unsolved}
        explore = [q for q in ask.questions if q in some and q not in pool]
        self._refuse_one_sided(len(pool), len(explore), len(mastered), max(right, default=0))
        found = {"pool": list(pool.values()), "explore": explore, "tokens": tokens}
        return {**memory, REHEARSAL: found}

    def _refuse_one_sided(self, pool: int, explore: int, mastered: int, best: int) -> None:
        """The error where there is nothing to rehearse, or nothing else."""
        if not pool:
            raise UserError(
                f"no prompt is mastered by the student as it begins: {mastered} have {self.enough} "
                f"right responses of {self.samples} (the best has {best}), and none of these a "
                "right one after them, which would be stored: there is nothing to rehearse. Lower "
                "enough (method.enough, or curriculum.enough), add easier prompts, see that the "
                "reward knows right answers, or train without rehearsal (grpo)"
            )
        if not explore:
            raise UserError(
                f"no prompt is left to learn from: the student as it begins has mastered {pool} of "
                "them, and others, if there are any, are left out as never solved. Add harder "
                "prompts, raise `enough`, or keep those (drop_unsolved=false)"
            )

    def asked(self, questions: Sequence[str], memory: Memory) -> list[int] | None:
        if REHEARSAL not in memory:
            return None
        explore = set(memory[REHEARSAL]["explore"])
        return [i for i, question in enumerate(questions) if question in explore]

    def recalled(self, count: int, step: int, seed: int, memory: Memory) -> Recalled:
        if REHEARSAL not in memory:
            return Recalled()
        pool = memory[REHEARSAL]["pool"]
        size = min(self.beside(count), len(pool))
        turn, part = divmod(step, parts := math.ceil(len(pool) / size))
        keys = row_keys([row["id"] for row in pool])
        draws = keyed_uniform(seed, turn, REHEARSAL, keys, 1, torch.float64)[:, 0]
        chosen = draws.argsort().tensor_split(parts)[part].tolist()
        return Recalled(beside=[again(pool[i]) for i in chosen])

    def beside(self, count: int) -> int:
        return self.rehearsed or PER_PROMPT * count

    @property
    def before(self) -> str:
        return f"{self.samples} responses to every prompt and one more to each that is mastered"

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        """How many responses are rehearsed in turn, how many prompts are asked, and the tokens that
        finding these took.
        """
        known = memory.get(REHEARSAL)
        return (
            {}
            if known is None
            else {
                "rehearsal_pool": float(len(known["pool"])),
                "prompts_to_learn": float(len(known["explore"])),
                "rehearsal_tokens": float(known["tokens"]),
            }
        )


def _written(
    ask: Ask, prompts: Sequence[int], each: int, first: int, what: str
) -> Iterator[tuple[Sequence[int], list[Rollout]]]:
    """Responses to these prompts, some prompts at a time, with rate and time left on the screen."""
    with progress(what, total=len(prompts) * each, unit="responses") as tick:
        for start in range(0, len(prompts), AT_ONCE):
            part = prompts[start : start + AT_ONCE]
            yield part, ask.sample(part, each, first, partial(_tell, tick, start * each))


def _tell(tick: Tick, before: int, now: int) -> None:
    """How many responses are written, those of earlier prompts too."""
    tick(before + now)


def _rehearsed(rollout: Rollout) -> Rollout:
    """A response as it is stored: marked, and compared with no other."""
    name = f"{REHEARSAL}/{rollout.id}"
    marks = {**rollout.marks, REHEARSAL: [True] * len(rollout.tokens)}
    return replace(rollout, id=name, group=name, marks=marks)
