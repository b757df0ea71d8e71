"""What is dropped, charged and marked once a step's rollouts are written and scored.

DAPO does two things besides its loss: it drops prompts that teach nothing, and charges for answers
near the length limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.base.errors import UserError
from opdkit.types import Rollout

Draw = Callable[[], list[Rollout]]  # rollouts of the next prompts, with rewards
# from a step's rollouts to those that are kept, changed where need be; the draw is for a filter
# that drops some and wants others in their place
Filter = Callable[[list[Rollout], Draw], list[Rollout]]

ROUNDS = 16  # of dynamic sampling, before it gives up


@dataclass(frozen=True)
class DynamicSampling:
    """Keeps the rollouts of informative prompts, and draws further ones until `wanted` prompts are
    there (arXiv 2503.14476).
    """

    wanted: int

    def __call__(self, rollouts: list[Rollout], more: Draw) -> list[Rollout]:
        rollouts, rounds = informative(rollouts), 1
        while (found := len({r.question for r in rollouts})) < self.wanted:
            if rounds == ROUNDS:
                raise UserError(
                    f"dynamic sampling found {found} prompts of {self.wanted} with both right and "
                    f"wrong responses in {rounds * self.wanted}: the data is too easy or too hard "
                    "for this student, or num_generations too small. Change one of them, or "
                    "dynamic_sampling=false"
                )
            known = {r.question for r in rollouts}
            rollouts += [r for r in informative(more()) if r.question not in known]
            rounds += 1
        keep = list(dict.fromkeys(r.question for r in rollouts))[: self.wanted]
        # what is compared with these stays beside them, whatever it answers
        groups = {r.group for r in rollouts if r.question in keep}
        return [r for r in rollouts if r.group in groups]


def informative(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Dynamic sampling's rule: the groups of which some rollouts are right and some are not.

    All right or all wrong, a group's advantages are zero. Accuracy decides, not reward, which
    shaping may have moved.
    """
    verdicts: dict[str, set[bool | None]] = {}
    for rollout in rollouts:
        verdicts.setdefault(rollout.group, set()).add(rollout.correct)
    return [rollout for rollout in rollouts if {True, False} <= verdicts[rollout.group]]


@dataclass(frozen=True)
class OverlongPenalty:
    """Adds the penalty for length to each reward; `correct` stays.

    DAPO: a limit of 20480 tokens, a margin of 4096.
    """

    max_completion_length: int
    margin: int  # tokens before the limit over which the penalty grows

    def __post_init__(self) -> None:
        if self.margin < 1:
            raise ValueError(
                f"margin={self.margin} must be at least 1: the tokens before the limit over which "
                "the penalty grows"
            )

    def __call__(self, rollouts: list[Rollout], more: Draw) -> list[Rollout]:
        return [
            r if r.reward is None else replace(r, reward=r.reward + self.penalty(len(r.tokens)))
            for r in rollouts
        ]

    def penalty(self, length: int) -> float:
        """In [-1, 0]: 0 up to max_completion_length - margin tokens, then falling in a straight
        line to -1 at max_completion_length.
        """
        start = self.max_completion_length - self.margin
        return -min(max((length - start) / self.margin, 0.0), 1.0)


@dataclass(frozen=True)
class MarkTokens:
    """Marks the tokens that are among `ids`, under a name that objectives read."""

    name: str
    ids: frozenset[int]

    def __call__(self, rollouts: list[Rollout], more: Draw) -> list[Rollout]:
        return [
            replace(r, marks={**r.marks, self.name: [t in self.ids for t in r.tokens]})
            for r in rollouts
        ]


def newlines(tokenizer: Any) -> frozenset[int]:
    """Tokens whose text contains a line end."""
    ids = sorted(tokenizer.get_vocab().values())
    return frozenset(
        i for i, text in zip(ids, tokenizer.batch_decode([[i] for i in ids])) if "\n" in text
    )
