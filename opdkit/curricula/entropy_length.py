"""A ladder of response lengths, climbed while the student keeps enough entropy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

from opdkit.base.errors import UserError
from opdkit.base.rules import Rules, at_least, follow
from opdkit.curricula.base import Plain
from opdkit.curricula.writer import Memory
from opdkit.types import Rollout

FIRST = 128  # tokens of the first rung where no ladder is given: the source's shortest
ON_FAIL = ("rollback", "hold")
START = {"rung": 0, "stable_rung": 0, "frozen": False, "steps": 0}
LADDER: Rules = {
    "ladder": (
        lambda ladder: len(ladder) != 1 and all(a < b for a, b in pairwise((0, *ladder))),
        "two lengths or more, rising from at least 1, or empty for powers of two",
        "responses of a stage are cut at its length, and the next stage has a longer one",
    ),
    "min_entropy": at_least(
        0, "it is the entropy, in nats per token, that the student must have kept to go on"
    ),
    "every": at_least(
        1, "it is how many steps a stage has, at least", null="those between two evaluations"
    ),
    "on_fail": (
        lambda what: what in ON_FAIL,
        f"one of {', '.join(ON_FAIL)}",
        "it is where the length stays once the entropy is too low",
    ),
}


@dataclass(frozen=True)
class EntropyLength(Plain):
    """Responses of a stage are cut at the length of its rung; a gate after it decides on the next.

        H = sum of the entropies at all tokens of held-out samples / number of these tokens
        H >= min_entropy: on to the next rung, if there is one
        H <  min_entropy: the length stays, for the rest of the run, at the longest that passed
        ("rollback") or at that which failed ("hold")

    Cut responses are no failures: they have no end that the student would learn. Where the first
    rung fails, the length stays there. Entropies are of the whole vocabulary at temperature 1, on
    the run's held-out prompts (`evaluate`), in nats. arXiv 2605.16826; the threshold, the number of
    steps and the ladder are ours, and weights are not rolled back.

    Arguments:
        ladder: lengths in tokens. Default: 128, 256 ... doubled up to the run's
            max_completion_length.
        min_entropy: that the student must have kept, in nats per token.
        every: steps of a stage: its gate is at the first evaluation after so many. Default: one
            stage from evaluation to evaluation.
        on_fail: where the length stays, "rollback" or "hold".

    Memory is plain JSON, length: rung, stable_rung (the longest that passed), frozen, steps (of
    this stage) and entropy (at the last gate).
    """

    kind: ClassVar[str] = "entropy_length"
    ladder: tuple[int, ...] = ()
    min_entropy: float = 0.3
    every: int | None = None
    on_fail: str = "rollback"

    def __post_init__(self) -> None:
        follow(LADDER, self)

    @property
    def measures(self) -> tuple[str, ...]:
        return ("entropy",)

    def within(self, limit: int) -> Self:
        ladder = self.ladder or doubled(limit)
        if len(ladder) < 2:
            raise UserError(
                f"curriculum entropy_length doubles the length from {FIRST} tokens up to the run's "
                f"max_completion_length, and {limit} leaves no longer one: it would never grow. "
                f"Set max_completion_length above {FIRST}, or curriculum.ladder to lengths of "
                "your own"
            )
        if ladder[-1] > limit:
            fitting = [length for length in ladder if length < limit] + [limit]
            raise UserError(
                f"curriculum.ladder goes up to {ladder[-1]} tokens, and no response has more than "
                f"max_completion_length={limit}: the rungs above would not differ. Set "
                f"max_completion_length to {ladder[-1]}, or the ladder to {fitting}"
            )
        return replace(self, ladder=ladder)

    def longest(self, memory: Memory) -> int:
        return self.ladder[self._state(memory)["rung"]] if self.ladder else FIRST

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        state = self._state(memory)
        return {**memory, "length": {**state, "steps": state["steps"] + 1}}

    def validated(self, measured: Mapping[str, float], memory: Memory) -> Memory:
        state, entropy = self._state(memory), measured["entropy"]
        if state["frozen"] or state["steps"] < (self.every or 1):
            return memory
        rung, stable, frozen = state["rung"], state["stable_rung"], False
        if entropy >= self.min_entropy:
            stable, rung = rung, min(rung + 1, len(self.ladder) - 1)
        else:
            rung, frozen = (stable if self.on_fail == "rollback" else rung), True
        new = {"rung": rung, "stable_rung": stable, "frozen": frozen, "steps": 0}
        return {**memory, "length": {**new, "entropy": entropy}}

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        state = self._state(memory)
        found = {name: float(state[name]) for name in ("rung", "stable_rung", "frozen")}
        found |= {"length": float(self.longest(memory)), "min_entropy": self.min_entropy}
        return found | ({"entropy": state["entropy"]} if "entropy" in state else {})

    def _state(self, memory: Memory) -> dict[str, Any]:
        return memory.get("length", START)


def doubled(limit: int) -> tuple[int, ...]:
    """128, 256 ... below the limit, then the limit."""
    ladder = [FIRST]
    while 2 * ladder[-1] < limit:
        ladder.append(2 * ladder[-1])
    return (*ladder, limit) if ladder[-1] < limit else (limit,)


def token_mean(parts: Iterable[tuple[float, int]]) -> float:
    """The mean over tokens of parts with (sum, count): sums and counts are added before they are
    divided, so that a token counts the same in a short part and in a long one; NaN of none.
    """
    sums, counts = zip(*parts) if (parts := list(parts)) else ((), ())
    return sum(sums) / sum(counts) if sum(counts) else float("nan")
