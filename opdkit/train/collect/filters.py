"""What is dropped, charged and marked once a step's rollouts are written and scored.

DAPO does two things besides its loss: it drops prompts that teach nothing, and charges for answers
near the length limit.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opdkit.base.errors import UserError, nearest
from opdkit.types import DataRow, Rollout

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


@dataclass
class TokenBudget:
    """Keeps at most so many of a step's response tokens in each domain; what is dropped is neither
    scored nor learnt from.

    Whole rollouts go, or whole groups where the method compares within them. A domain's are taken
    in an order that a hash of seed and rollout id gives, which knows no length, up to the first
    that does not fit; those behind it are not tried, or short ones would fill the gaps. What is
    left of a bias to short ones: the one at the border, at most one in each domain and step, is
    the likelier a long one.

    Arguments:
        most: tokens by domain; of a domain that is not there all are kept.
        domain: the name of a row's.
        together: whether rollouts of a group stay together.
        seed: of the run.
    """

    most: Mapping[str, int]
    domain: Callable[[DataRow], str]
    together: bool = False
    seed: int = 0
    # of the last step: tokens kept and rollouts dropped, by domain
    counts: dict[str, float] = field(default_factory=dict)

    def __call__(self, rollouts: list[Rollout], more: Draw) -> list[Rollout]:
        units: dict[tuple[str, str], list[Rollout]] = {}
        for rollout in rollouts:
            name = rollout.group if self.together else rollout.id
            units.setdefault((self.domain(rollout.row), name), []).append(rollout)
        used, kept = dict.fromkeys(sorted({domain for domain, _ in units}), 0), set[str]()
        full: set[str] = set()
        for (domain, _), unit in sorted(units.items(), key=lambda item: self._key(item[1])):
            tokens = sum(r.length for r in unit)
            if used[domain] + tokens > self.most.get(domain, math.inf):
                full.add(domain)
            if domain not in full:
                used[domain] += tokens
                kept |= {r.id for r in unit}
        if rollouts and not kept:
            self._refuse(units)
        dropped = Counter(self.domain(r.row) for r in rollouts if r.id not in kept)
        self.counts = {f"tokens_by_domain/{name}": float(n) for name, n in used.items()}
        self.counts |= {f"dropped_by_domain/{name}": float(dropped[name]) for name in used}
        return [r for r in rollouts if r.id in kept]

    def _key(self, unit: Sequence[Rollout]) -> bytes:
        """The same in each process and after a resume; of a group that comes again another."""
        first = min(r.id for r in unit)
        return hashlib.blake2b(f"{self.seed}/{first}".encode(), digest_size=8).digest()

    def _refuse(self, units: Mapping[tuple[str, str], Sequence[Rollout]]) -> None:
        what = "groups of responses" if self.together else "responses"
        sizes = sorted(sum(r.length for r in unit) for unit in units.values())
        raise UserError(
            f"token_budget={dict(self.most)} leaves nothing of a step: its {what} have {sizes[0]} "
            f"to {sizes[-1]} tokens. Raise it to several times that, or lower num_generations or "
            "max_completion_length"
        )


def refuse_domains(most: Mapping[str, int], known: Collection[str], column: str) -> None:
    """A budget for what no row is of, which would never be spent."""
    for name in most:
        if name not in known:
            raise UserError(
                f"token_budget.{name} is for no row: by the column {column!r} the data has "
                f"{', '.join(sorted(known))}{nearest(name, list(known))}. Name one of these, or "
                "another column with domain=COLUMN"
            )


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
