"""The support of a divergence: the entries of the vocabulary that it sums over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.objective.facts import LogpAtFact, TopFact
from opdkit.objective.maths import restrict

# marks an entry outside the support until both sides are masked; a log-prob is never +inf
ABSENT = math.inf


@dataclass(frozen=True)
class Support:
    """Which vocabulary entries a divergence sums over, and what becomes of the rest.

    support: "teacher" or "student" (its k most probable tokens before this step), "union" or
    "intersection" of both, "full". rest: see `maths.restrict`. Log-probs are those of the whole
    vocabulary before `rest` is applied.
    """

    support: str = "full"
    k: int | None = None
    rest: str = "raw"
    student: str = "student"
    teacher: str = "teacher"

    def __post_init__(self) -> None:
        if self.support not in ("full", "teacher", "student", "union", "intersection"):
            raise ValueError(
                f"support={self.support!r} must be one of full, teacher, student, union, "
                "intersection"
            )
        if (self.support == "full") != (self.k is None):
            raise ValueError(
                f"support={self.support!r} with k={self.k}: a top-k support needs k, the full "
                "vocabulary takes none"
            )
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")
        if self.rest not in ("raw", "renormalise", "target", "tail"):
            raise ValueError(f"rest={self.rest!r} must be one of raw, renormalise, target, tail")

    @property
    def whole(self) -> bool:
        """Whether what is compared sums to one on both sides."""
        return self.support == "full" or self.rest in ("renormalise", "tail")

    def owners(self) -> tuple[str, ...]:
        """The models whose top-k make the support."""
        both = (self.student, self.teacher)
        return {
            "full": (),
            "teacher": (self.teacher,),
            "student": (self.student,),
            "intersection": (self.student,),
        }.get(self.support, both)

    def entries(self, read: Any) -> tuple[Tensor, Tensor]:
        """ids [..., K] and the teacher's log-probs there, -inf where an entry is absent; `read`
        supplies facts.
        """
        k = self.k or 0
        ids = torch.cat([read(TopFact(owner, k)) for owner in self.owners()], -1)
        lt = torch.cat([read(LogpAtFact(self.teacher, owner, k)) for owner in self.owners()], -1)
        absent = torch.zeros_like(lt, dtype=torch.bool)
        if self.support == "teacher":
            absent = lt == -math.inf  # the teacher named fewer than k tokens
        elif self.support == "union":  # an id named by both counts once
            own, other = ids.split(ids.shape[-1] // 2, -1)
            again = (other[..., :, None] == own[..., None, :]).any(-1)
            absent = torch.cat(
                [torch.zeros_like(again), again | (lt[..., own.shape[-1] :] == -math.inf)], -1
            )
        elif self.support == "intersection":
            absent = ~(ids[..., :, None] == read(TopFact(self.teacher, k))[..., None, :]).any(-1)
        return ids, torch.where(absent, ABSENT, lt)

    def pair(self, ls: Tensor, lt: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [..., K] of both on the support, absent entries -inf on both sides, the rest
        treated: see `maths.restrict`.
        """
        absent = lt == ABSENT
        ls, lt = (x.masked_fill(absent, -math.inf) for x in (ls, lt))
        return restrict(ls, lt, self.rest)
