"""A teacher that has spoken already: log-probs of rollouts that `opdkit cache-teacher` stored,
looked up instead of computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.curricula.cached import reads_cache
from opdkit.data.cache import Cache, open_cache, refuse_tokenizer
from opdkit.data.shards import Scored
from opdkit.models.held import ELSEWHERE, Held
from opdkit.models.identity import Identity
from opdkit.models.layout import Layout
from opdkit.models.shapes import Shape
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.supply import Tensors
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.refuse import refuse_facts
from opdkit.teachers.teacher import Teacher

REMEDY = "use a teacher in this process (teacher=MODEL), which costs its forward pass"
# of a step without tokens
NOTHING = Scored(np.zeros(0), np.zeros((0, 0), dtype=np.int64), np.zeros((0, 0)))


@dataclass(frozen=True)
class CachedScorer:
    """Answers for the rollouts of one cache, in float16's precision."""

    cache: Cache
    method: str = "own"  # whose objective asks

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N].

        The rollouts' tokens must be those that were scored.
        """
        refuse(self.cache, self.method, wanted)
        rows, columns = positions.cpu() // layout.width, positions.cpu() % layout.width
        used = rows.unique().tolist()
        scores = [self.cache.scores(layout.rollouts[b]) for b in used] or [NOTHING]
        lengths = torch.zeros(len(layout.rollouts), dtype=torch.int64)
        lengths[used] = torch.tensor(
            [len(s.logp) for s in scores if s is not NOTHING], dtype=torch.int64
        )
        # in the scores of all, one after the other
        at = ((lengths.cumsum(0) - lengths)[rows] + columns).numpy()

        made: Tensors = {}
        for fact in wanted:
            values = torch.from_numpy(np.concatenate([fact.of_notes(s) for s in scores])[at])
            made[fact] = values.to(positions.device, fact.dtype)
        return made


def refuse(cache: Cache, method: str, wanted: Collection[Fact]) -> None:
    """What a cache does not hold."""
    others = [fact for fact in wanted if not fact.in_scores(fact.models[0])]
    refuse_facts(method, "a cached teacher", others, REMEDY)
    deepest = max((fact.depth(fact.models[0]) for fact in wanted), default=0)
    if deepest > cache.origin.top_k:
        kept = (
            f"the teacher's top {cache.origin.top_k}"
            if cache.origin.top_k
            else "none of the teacher's most probable tokens"
        )
        lower = f", or use k={cache.origin.top_k}" if cache.origin.top_k else ""
        raise UserError(
            f"method {method!r} reads the teacher's top {deepest}, and {cache.folder} holds "
            f"{kept}: write it again with `opdkit cache-teacher ... --top-k {deepest}`{lower}"
        )


@dataclass(frozen=True)
class CachedTeacher(Teacher):
    """A folder that `opdkit cache-teacher` wrote: log-probs of its own rollouts, scored once."""

    kind = "cached"
    main = "folder"
    folder: str

    @property
    def own_data(self) -> str | None:
        return self.folder

    def check(self, context: TeacherContext) -> None:
        self.open(context)

    def open(self, context: TeacherContext) -> CachedScorer:
        return context.once(repr(self), lambda: self._open(context))

    def _open(self, context: TeacherContext) -> CachedScorer:
        """The cache, once it is known to hold what the method reads of rollouts that the method
        takes from it.
        """
        method, name = context.method, context.method.name or "own"
        if not reads_cache(method.curriculum):
            raise UserError(
                f"method {name!r} trains on responses written at each step ({method.curriculum}), "
                f"which the teacher of {self.folder} has not scored: use lightning_opd, take the "
                "rollouts from the cache with rollouts=cache, or use a live teacher (teacher=MODEL)"
            )
        cache = open_cache(self.folder)
        refuse_tokenizer(cache, context.tokenizer)
        refuse(cache, name, method.needs.of(context.role))
        return CachedScorer(cache, name)

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        return [Held(role, f"cache {self.folder}", ELSEWHERE)]

    def identity(self) -> Identity:
        """The teacher that scored its rollouts."""
        return open_cache(self.folder).origin.teacher
