"""Several teachers: each rollout is scored by the one that its row names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from opdkit.base.errors import UserError, nearest
from opdkit.data.views import View
from opdkit.models.held import Held
from opdkit.models.identity import Identity, identify_together
from opdkit.models.layout import Layout
from opdkit.models.shapes import Shape
from opdkit.objective.alignment import Pair, SpanFact
from opdkit.objective.companion import Companion
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.head import Head
from opdkit.objective.needs import Needs
from opdkit.objective.supply import Tensors
from opdkit.teachers.base import (
    Longest,
    Remote,
    answers,
    cut,
    early,
    elsewhere,
    heads_of,
    least_reads,
    longest_of,
    side_by_side,
    tightest,
)
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.teacher import Teacher, precisions
from opdkit.types import DataRow, Rollout


@dataclass(frozen=True)
class RoutedSource:
    """Several sources, each at its own positions."""

    sources: Sequence[Any]
    which: Tensor  # [B * T] index of the source

    @property
    def vocabulary(self) -> int:
        return max(source.vocabulary for source in self.sources)

    def logits(self, positions: Tensor) -> Tensor:
        """[n, V] at flat positions [n]."""
        which = self.which[positions]
        order = which.argsort(stable=True)
        parts = [source.logits(positions[which == i]) for i, source in enumerate(self.sources)]
        kept = [part for part in parts if len(part)] or parts[:1]
        logits = torch.cat(kept)
        return torch.empty_like(logits).index_copy_(0, order, logits)

    def still(self, moving: Collection[int]) -> RoutedSource:
        """See `Source.still`."""
        return replace(self, sources=[source.still(moving) for source in self.sources])

    def read(self, fact: SpanFact, mask: Tensor) -> Tensor:
        """[B, T]: a fact of each row's own source."""
        parts = torch.stack([source.read(fact, mask).expand(mask.shape) for source in self.sources])
        return parts.gather(0, self.which.view(1, *mask.shape))[0]

    def pairs(self, positions: Tensor, fact: SpanFact, vocabulary: int) -> list[Pair]:
        """Distributions [n, V] of each source at its own of the positions [N]; their vocabularies
        may differ.
        """
        out = []
        for i, source in enumerate(self.sources):
            at = (self.which[positions] == i).nonzero()[:, 0]
            found = source.pairs(positions[at], fact, vocabulary) if len(at) else []
            out += [pair._replace(at=at if pair.at is None else at[pair.at]) for pair in found]
        return out


def route(name: str | None, known: Collection[str], who: str) -> str:
    """The key of the teacher that serves a row, or rollout, called `who`."""
    if name in known:
        return str(name)
    if "default" in known:
        return "default"
    said = (
        "names no teacher"
        if name is None
        else f"names the teacher {name!r}{nearest(name, list(known))}"
    )
    raise UserError(
        f"{who} {said}. The run has teachers for {', '.join(known)}, and none would score it: add "
        "that teacher to the run (teacher.NAME=MODEL), or one called 'default'"
    )


@dataclass(frozen=True)
class _Several:
    teachers: Mapping[str, Any]

    @property
    def heads(self) -> list[Head]:
        return [head for teacher in self.teachers.values() for head in heads_of(teacher)]

    @property
    def reads(self) -> int | None:
        return least_reads(self.teachers.values())

    def longest(self, rows: Sequence[DataRow]) -> Longest:
        """As `Viewed.longest`, each row with its own teacher."""
        keys = list(self.teachers)
        named = [(route(row.get("teacher"), keys, f"row {row['id']}"), row) for row in rows]
        return tightest(
            longest_of(teacher, [row for name, row in named if name == key])
            for key, teacher in self.teachers.items()
        )

    @property
    def elsewhere(self) -> bool:
        return all(map(elsewhere, self.teachers.values()))

    def early(self, rollout: Rollout) -> bool:
        """As its own teacher says, where none of the others would compute here beside it."""
        named = route(rollout.row.get("teacher"), self.teachers, f"rollout {rollout.id}")
        return self.elsewhere and early(self.teachers[named], rollout)

    def cut(self, vocab: int | None) -> Self:
        """The same teachers, their heads kept to the first rows."""
        return replace(
            self, teachers={name: cut(teacher, vocab) for name, teacher in self.teachers.items()}
        )


@dataclass(frozen=True)
class Routed(_Several):
    """Several teachers; a row is scored by the one that its `teacher` column names. "default"
    serves rows that name none.
    """

    def source(self, layout: Layout, positions: Tensor) -> RoutedSource:
        """Each row's own teacher at flat positions [N]."""
        which = routes(self.teachers, layout, positions.device)
        calls = [
            partial(t.source, layout, positions[which[positions] == i])
            for i, t in enumerate(self.teachers.values())
        ]
        return RoutedSource(side_by_side(self.teachers.values(), calls), which)


@dataclass(frozen=True)
class RoutedRemote(_Several):
    """Several teachers by route, some of them elsewhere: they answer with numbers."""

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N], each row's of its own teacher."""
        which = routes(self.teachers, layout, positions.device)[positions]
        made: Tensors = {}
        asked = [
            (teacher, at)
            for i, teacher in enumerate(self.teachers.values())
            # one in this process may be spread over several, which ask it together
            if len(at := (which == i).nonzero()[:, 0]) or not isinstance(teacher, Remote)
        ]
        calls = [
            partial(answers, t, wanted, layout, positions[at], {f: v[at] for f, v in ids.items()})
            for t, at in asked
        ]
        parts = side_by_side([teacher for teacher, _ in asked], calls)
        for (_, at), part in zip(asked, parts):
            for fact, values in part.items():
                if fact not in made:
                    made[fact] = values.new_zeros(len(positions), *values.shape[1:])
                made[fact][at] = values
        return made


def routes(teachers: Mapping[str, Any], layout: Layout, device: torch.device) -> Tensor:
    """[B * T]: number of the teacher that serves each position."""
    keys = list(teachers)
    chosen = [
        keys.index(route(r.row.get("teacher"), keys, f"rollout {r.id}")) for r in layout.rollouts
    ]
    return torch.tensor(chosen, device=device).repeat_interleave(layout.width)


@dataclass(frozen=True)
class RoutedTeacher(Teacher):
    """Several teachers; a row is scored by the one that its `teacher` column names."""

    kind = "routed"
    teachers: dict[str, Teacher]

    def said(self) -> dict[str, Any]:
        return {name: teacher.said() for name, teacher in self.teachers.items()}

    @property
    def starts_student(self) -> bool:
        return any(member.starts_student for member in self.teachers.values())

    @property
    def views(self) -> tuple[View, ...]:
        return tuple(view for teacher in self.teachers.values() for view in teacher.views)

    def companions(self, model: str) -> Iterable[Companion]:
        for name, teacher in self.teachers.items():
            yield from teacher.companions(model if name == "default" else f"{model}.{name}")

    @property
    def opens_local_model(self) -> bool:
        return all(teacher.opens_local_model for teacher in self.teachers.values())

    @property
    def routes(self) -> Mapping[str, Teacher]:
        return self.teachers

    def refuse(self, method: str, needs: Needs, model: str = "teacher") -> None:
        for teacher in self.teachers.values():
            teacher.refuse(method, needs, model)

    def check(self, context: TeacherContext) -> None:
        for name, teacher in self.teachers.items():
            teacher.check(context.on_route(name))

    def ends(self, context: TeacherContext) -> frozenset[int]:
        members = (t.ends(context.on_route(name)) for name, t in self.teachers.items())
        return frozenset().union(*members)

    def open(self, context: TeacherContext) -> Routed | RoutedRemote:
        members = {name: t.open(context.on_route(name)) for name, t in self.teachers.items()}
        elsewhere = any(isinstance(member, Remote) for member in members.values())
        return RoutedRemote(members) if elsewhere else Routed(members)

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        """Every one scores an equal share of the rollouts, as nothing else is known."""
        count = len(self.teachers)
        return [
            replace(held, share=held.share / count)
            for name, teacher in self.teachers.items()
            for held in teacher.held(role if count == 1 else f"{role}.{name}", dtype, shape_of)
        ]

    def identity(self) -> Identity:
        return identify_together({name: t.identity() for name, t in self.teachers.items()})

    def recorded(self) -> Identity:
        return identify_together({name: t.recorded() for name, t in self.teachers.items()})

    def precision(self, usual: str) -> str:
        return precisions(self.teachers.values(), usual)
