"""Pairs of the data: both responses of each prompt, of which one was preferred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from opdkit.curricula.base import Plain
from opdkit.curricula.data import given
from opdkit.curricula.student import StudentWriter
from opdkit.curricula.writer import Memory, StepContext, Writer
from opdkit.types import Prompt, Rollout, Sampling

ONLINE = "online"  # the mark of what the student writes beside pairs of the data


@dataclass(frozen=True)
class PairWriter(Writer):
    """Two responses per prompt, those of its data row: what was preferred is right and has reward
    1, the other is wrong and has 0. Where both are the same tokens, once they are cut at the run's
    limit or as the tokenizer writes them, neither is preferred, and both are wrong. With `online`
    the student writes as many more as that, or `sampling.num_generations` where this is above 1, to
    the same prompt and in the same group.
    """

    online: int = 0

    @property
    def reads_pairs(self) -> bool:
        return True

    @property
    def judged(self) -> frozenset[str]:
        return frozenset({"correct"} if self.online else {"reward", "correct"})

    @property
    def marks(self) -> frozenset[str]:
        return frozenset({ONLINE} if self.online else ())

    @property
    def draws(self) -> bool:
        return self.online > 0

    def per_prompt(self, sampling: Sampling) -> int:
        return 2

    def sampled(self, sampling: Sampling) -> float:
        return StudentWriter(self.online).per_prompt(sampling) if self.online else 0

    def rollouts(self, sampling: Sampling) -> int:
        return 2 + int(self.sampled(sampling))

    def write(self, context: StepContext) -> list[Rollout]:
        pairs = [rollout for prompt in context.once for rollout in self._pair(prompt, context)]
        if not self.online:
            return pairs
        own = StudentWriter(self.online).write(context)
        marked = [replace(r, marks={**r.marks, ONLINE: [True] * len(r.tokens)}) for r in own]
        return pairs + marked

    def _pair(self, prompt: Prompt, context: StepContext) -> list[Rollout]:
        longest, name = context.sampling.max_completion_length, f"{context.step}/{prompt.id}"
        chosen, rejected = (
            given(prompt, tokens, longest, f"{name}/{column}", text)
            for column, (tokens, text) in zip(("chosen", "rejected"), context.pair(prompt))
        )
        right = chosen.tokens != rejected.tokens
        return [
            replace(chosen, reward=float(right), correct=right),
            replace(rejected, reward=0.0, correct=False),
        ]


@dataclass(frozen=True)
class Preference(Plain):
    """Every prompt with the two responses that its row holds, `chosen` and `rejected` (see
    `data.pairs`); no reward is needed. With `online` the student's own responses stand beside them,
    marked "online": so many to each prompt, or the run's num_generations where that is set.
    """

    kind: ClassVar[str] = "preference"
    online: int = 0

    def __post_init__(self) -> None:
        if self.online < 0:
            raise ValueError(
                f"online={self.online} must be at least 0: it is how many responses the student "
                "writes beside each pair"
            )

    @property
    def authors(self) -> tuple[str, ...]:
        return ("student", "data") if self.online else ("data",)

    @property
    def writer(self) -> Writer:
        return PairWriter(self.online)

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        """The share of pairs of which neither response is preferred."""
        chosen = [r.correct for r in rollouts if "given" in r.marks and r.id.endswith("/chosen")]
        return {"alike": 1 - sum(map(bool, chosen)) / len(chosen)} if chosen else {}
