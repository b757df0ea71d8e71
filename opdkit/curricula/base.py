"""The interface of a curriculum, and the plain one: every prompt as it is, every response written
by the student, nothing remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

from opdkit.curricula.recall import Ask, Recalled
from opdkit.curricula.student import StudentWriter
from opdkit.curricula.writer import Memory, Writer
from opdkit.types import Rollout


class Curriculum(Protocol):
    """A frozen dataclass of settings: which prompts a step asks, who writes the responses and how
    long they may be, and what is remembered of them.
    """

    # whether `observe` must see nothing but the student's own responses of the step, with rewards:
    # those who remember how often the student solves a prompt
    needs_own: ClassVar[bool]

    @property
    def authors(self) -> tuple[str, ...]:
        """Who writes tokens that its method learns from (see `types.AUTHORS`)."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """What `validated` wants to know at every evaluation: "loss", on held-out reference
        responses, or "entropy", of the student's own held-out samples, both in nats per token. A
        run without evaluations between its ends is then refused.
        """
        ...

    @property
    def writer(self) -> Writer | None:
        """Who writes; None: a curriculum that only remembers leaves it to the student."""
        ...

    @property
    def recalls(self) -> bool:
        """Whether a step may have rollouts that were written earlier: see `recalled`."""
        ...

    @property
    def marks(self) -> frozenset[str]:
        """The marks of its own that it sets on rollouts, its writer's apart."""
        ...

    def prepared(self, ask: Ask, memory: Memory) -> Memory:
        """Memory before the first step: what it has to know of the student that begins. It is asked
        of a resumed run too, where `memory` has it already.
        """
        ...

    def within(self, limit: int) -> Self:
        """The same for a run whose responses have at most `limit` tokens; refuses what cannot be
        kept within.
        """
        ...

    def longest(self, memory: Memory) -> int | None:
        """Tokens after which the responses of the next step are cut; None: the run's limit."""
        ...

    def choose(
        self, questions: Sequence[str], count: int, step: int, seed: int, memory: Memory
    ) -> list[int] | None:
        """Which `count` of the run's questions the step asks, by index; None: the next in the
        stream. Where a step asks again, `questions` are those that it has not asked yet.
        """
        ...

    def asked(self, questions: Sequence[str], memory: Memory) -> Sequence[int] | None:
        """Which of the run's questions are asked at all, by index; None: all."""
        ...

    def recalled(self, count: int, step: int, seed: int, memory: Memory) -> Recalled:
        """What a step of `count` prompts has again of rollouts that were written earlier."""
        ...

    def beside(self, count: int) -> int:
        """How many of these a step of `count` prompts has besides its own, at most."""
        ...

    @property
    def before(self) -> str:
        """What `prepared` has written before the first step, in words; "" for nothing."""
        ...

    def passes(self, step: int, total_steps: int) -> int | None:
        """How often step number `step` (from 0) goes through its rollouts; None: as often as the
        run says (`optim.passes`).
        """
        ...

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        """Memory after the step's rollouts have been scored, those too that filters drop."""
        ...

    def validated(self, measured: Mapping[str, float], memory: Memory) -> Memory:
        """Memory after an evaluation, the first of which is before training; `measured` holds what
        `measures` names.
        """
        ...

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        """Where it stood in step number `step` (from 0), whose rollouts these are, by name: for the
        run's curves. The memory is that which the step was asked with.
        """
        ...


@dataclass(frozen=True)
class Plain:
    """Every prompt as it is, every response written by the student, nothing remembered."""

    kind: ClassVar[str] = "fixed"  # as a run's `curriculum` names it
    needs_own: ClassVar[bool] = False

    @property
    def authors(self) -> tuple[str, ...]:
        return ("student",)

    @property
    def measures(self) -> tuple[str, ...]:
        return ()

    @property
    def writer(self) -> Writer | None:
        return None

    @property
    def recalls(self) -> bool:
        return False

    @property
    def marks(self) -> frozenset[str]:
        return frozenset()

    def prepared(self, ask: Ask, memory: Memory) -> Memory:
        return memory

    def within(self, limit: int) -> Self:
        return self

    def longest(self, memory: Memory) -> int | None:
        return None

    def choose(
        self, questions: Sequence[str], count: int, step: int, seed: int, memory: Memory
    ) -> list[int] | None:
        return None

    def asked(self, questions: Sequence[str], memory: Memory) -> Sequence[int] | None:
        return None

    def recalled(self, count: int, step: int, seed: int, memory: Memory) -> Recalled:
        return Recalled()

    def beside(self, count: int) -> int:
        return 0

    @property
    def before(self) -> str:
        return ""

    def passes(self, step: int, total_steps: int) -> int | None:
        return None

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        return memory

    def validated(self, measured: Mapping[str, float], memory: Memory) -> Memory:
        return memory

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        return {}


def writer_of(curriculum: Curriculum) -> Writer:
    """Who writes under a curriculum: its writer, else the student."""
    return curriculum.writer or StudentWriter()
