"""Several curricula at once, where they do not contradict each other."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Self, cast

from opdkit.base.errors import UserError
from opdkit.curricula.base import Curriculum, Plain, writer_of
from opdkit.curricula.mixed import Mixed
from opdkit.curricula.recall import Ask, Recalled
from opdkit.curricula.writer import Memory, Writer
from opdkit.types import Rollout

IDLE: tuple[Curriculum, ...] = (Plain(), Mixed(1.0))  # those that decide and remember nothing


@dataclass(frozen=True)
class Together:
    """Several curricula: the one that decides who writes does so, each remembers what it needs."""

    parts: tuple[Curriculum, ...]

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m for part in self.parts for m in part.measures))

    @property
    def needs_own(self) -> bool:
        return any(part.needs_own for part in self.parts)

    @property
    def authors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a for part in self.parts for a in part.authors))

    @property
    def writer(self) -> Writer | None:
        return next((part.writer for part in self.parts if part.writer is not None), None)

    @property
    def recalls(self) -> bool:
        return any(part.recalls for part in self.parts)

    @property
    def marks(self) -> frozenset[str]:
        return frozenset(mark for part in self.parts for mark in part.marks)

    def prepared(self, ask: Ask, memory: Memory) -> Memory:
        return reduce(lambda known, part: part.prepared(ask, known), self.parts, memory)

    def within(self, limit: int) -> Self:
        return replace(self, parts=tuple(part.within(limit) for part in self.parts))

    def longest(self, memory: Memory) -> int | None:
        """The shortest of those that say something."""
        said = [part.longest(memory) for part in self.parts]
        return min((length for length in said if length is not None), default=None)

    def choose(
        self, questions: Sequence[str], count: int, step: int, seed: int, memory: Memory
    ) -> list[int] | None:
        """What the first part that chooses says."""
        chosen = (part.choose(questions, count, step, seed, memory) for part in self.parts)
        return next((found for found in chosen if found is not None), None)

    def asked(self, questions: Sequence[str], memory: Memory) -> Sequence[int] | None:
        """Those that no part leaves out."""
        said = [part.asked(questions, memory) for part in self.parts]
        known = [set(some) for some in said if some is not None]
        return sorted(set.intersection(*known)) if known else None

    def recalled(self, count: int, step: int, seed: int, memory: Memory) -> Recalled:
        every = (part.recalled(count, step, seed, memory) for part in self.parts)
        return reduce(operator.add, every, Recalled())

    def beside(self, count: int) -> int:
        return sum(part.beside(count) for part in self.parts)

    @property
    def before(self) -> str:
        return ", ".join(part.before for part in self.parts if part.before)

    def passes(self, step: int, total_steps: int) -> int | None:
        """What the first part that says it says."""
        said = (part.passes(step, total_steps) for part in self.parts)
        return next((number for number in said if number is not None), None)

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        return reduce(lambda known, part: part.observe(rollouts, known), self.parts, memory)

    def validated(self, measured: Mapping[str, float], memory: Memory) -> Memory:
        return reduce(lambda known, part: part.validated(measured, known), self.parts, memory)

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        told = [part.metrics(rollouts, step, total_steps, memory) for part in self.parts]
        return {name: value for part in told for name, value in part.items()}


def join(a: Curriculum, b: Curriculum, names: tuple[str, str]) -> Curriculum:
    """Both curricula at once, where they do not contradict each other."""
    every = [part for c in (a, b) for part in (c.parts if isinstance(c, Together) else (c,))]
    parts = tuple(dict.fromkeys(part for part in every if part not in IDLE))
    writing = [part for part in parts if part.writer is not None]
    if len(writing) > 1 or len({type(part) for part in parts}) < len(parts):
        raise UserError(
            f"{names[0]} and {names[1]} cannot be combined: each brings its own curriculum, "
            f"{' and '.join(map(str, parts))}, and only one can decide. Choose arguments that "
            "switch one of them off"
        )
    other = next((part for part in writing if not writer_of(part).own), None)
    if other is not None and any(part.needs_own for part in parts):
        raise UserError(
            f"{names[0]} and {names[1]} cannot be combined: one weighs prompts by how often the "
            f"student now solves them, and with {other} not every response is the student's own of "
            "this step. Let the student write every batch (lmbda=1, schedule=None)"
        )
    if other is not None and any(part.recalls for part in parts):
        raise UserError(
            f"{names[0]} and {names[1]} cannot be combined: one has rollouts again that the "
            f"student wrote earlier, beside those that it writes now, and {other} says otherwise "
            "who writes a step. Let the student write every batch (lmbda=1, schedule=None)"
        )
    whole = next((part for part in writing if not writer_of(part).cuts), None)
    if whole is not None and any(part.longest({}) is not None for part in parts):
        raise UserError(
            f"{names[0]} and {names[1]} cannot be combined: one cuts the responses of a step at "
            f"lengths of its own, and with {whole} some were written earlier and are read whole. "
            "Let the student write every batch, or leave the lengths as they are"
        )
    made = cast(Curriculum, Together(parts))  # whether it needs own rollouts depends on its parts
    return made if len(parts) > 1 else parts[0] if parts else a


def keeper(curriculum: Curriculum, name: str) -> Curriculum:
    """What a weight brings along: memory, but not a decision about who writes, which is that of the
    method it multiplies.
    """
    if curriculum.writer is not None or curriculum.recalls:
        raise UserError(
            f"{name} as a weight would also bring its curriculum {curriculum}, which decides who "
            "writes the responses; that is for the method on the left to say. Use it there, or as "
            "a weight without that curriculum"
        )
    return curriculum
