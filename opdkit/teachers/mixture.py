"""The weighted mean of several teachers' distributions, as one teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError, nearest
from opdkit.data.views import View
from opdkit.models.held import Held
from opdkit.models.identity import Identity, identify_together
from opdkit.models.layout import Layout
from opdkit.models.shapes import Shape
from opdkit.objective.companion import Companion
from opdkit.objective.facts import Fact
from opdkit.objective.head import Head
from opdkit.teachers.base import Longest, Scorer, cut, heads_of, least_reads, longest_of, tightest
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.teacher import Teacher, precisions
from opdkit.teachers.views.translated import as_span_teacher
from opdkit.types import DataRow, Rollout


@dataclass(frozen=True)
class MixedSource:
    """log sum_i w_i pi_i(v): normalised already, so it answers for logits."""

    sources: Sequence[Any]
    logw: Tensor  # [B * T, number of sources]: log-weights

    @property
    def vocabulary(self) -> int:
        return max(source.vocabulary for source in self.sources)

    def logits(self, positions: Tensor) -> Tensor:
        """[n, V] log-probs at flat positions [n]; no gradient."""
        total: Tensor | None = None
        # one more [n, V] at a time, however many teachers
        for i, source in enumerate(self.sources):
            logps = source.logits(positions).log_softmax(-1)
            logps += self.logw[positions, i, None].to(logps.dtype)
            total = logps if total is None else torch.logaddexp(total, logps)
        assert total is not None
        return total

    def still(self, moving: Collection[int]) -> MixedSource:
        """See `Source.still`."""
        return replace(self, sources=[source.still(moving) for source in self.sources])


@dataclass(frozen=True)
class ProductSource(MixedSource):
    """sum_i w_i log pi_i(v), which are logits: of a distribution that is their weighted geometric
    mean, normalised.
    """

    def logits(self, positions: Tensor) -> Tensor:
        """[n, V] at flat positions [n]; no gradient."""
        shares = self.logw[positions].exp()
        total: Tensor | None = None
        for i, source in enumerate(self.sources):
            logps = source.logits(positions).log_softmax(-1)
            # a teacher that counts for nothing says nothing, also of what it rules out
            share = shares[:, i, None].to(logps.dtype)
            logps = torch.where(share > 0, logps * share, 0.0)
            total = logps if total is None else total + logps
        assert total is not None
        return total


FORMS: dict[str, type[MixedSource]] = {"arithmetic": MixedSource, "geometric": ProductSource}


@dataclass(frozen=True)
class MixtureScorer:
    """Teachers in this process whose distributions are averaged; weights by name, or in a data
    column, or equal.
    """

    teachers: Mapping[str, Scorer]
    weights: Mapping[str, float] | str | None = None
    form: str = "arithmetic"

    @property
    def heads(self) -> list[Head]:
        return [head for teacher in self.teachers.values() for head in heads_of(teacher)]

    @property
    def reads(self) -> int | None:
        return least_reads(self.teachers.values())

    def longest(self, rows: Sequence[DataRow]) -> Longest:
        """As `Viewed.longest`: each of them reads every row."""
        return tightest(longest_of(teacher, rows) for teacher in self.teachers.values())

    def cut(self, vocab: int | None) -> MixtureScorer:
        """The same teachers, their heads kept to the first rows."""
        return replace(
            self, teachers={name: cut(teacher, vocab) for name, teacher in self.teachers.items()}
        )

    def source(self, layout: Layout, positions: Tensor) -> MixedSource:
        """The mean of the members' distributions at flat positions [N]."""
        shares = torch.tensor(
            [self.shares(r) for r in layout.rollouts], dtype=torch.float64, device=positions.device
        )
        logw = shares.log().repeat_interleave(layout.width, 0)
        return FORMS[self.form](
            [teacher.source(layout, positions) for teacher in self.teachers.values()], logw
        )

    def shares(self, rollout: Rollout) -> list[float]:
        """The weights of one rollout's teachers, summing to 1."""
        if isinstance(self.weights, str):
            given = rollout.row.get(self.weights)
            if not isinstance(given, Mapping):
                raise UserError(
                    f"the mixture reads its weights from the column {self.weights!r}; in the row "
                    f"of rollout {rollout.id} it is {given!r}, not a mapping from teacher to weight"
                )
            if unknown := sorted(set(given) - set(self.teachers)):
                raise UserError(
                    f"the column {self.weights!r} of rollout {rollout.id} names "
                    f"{unknown[0]!r}{nearest(unknown[0], list(self.teachers))}; the mixture's "
                    f"teachers are {', '.join(self.teachers)}"
                )
        else:
            given = self.weights or dict.fromkeys(self.teachers, 1.0)
        weights = [float(given.get(name) or 0.0) for name in self.teachers]
        total = sum(weights)
        if any(w < 0 for w in weights) or not 0 < total < math.inf:
            raise UserError(
                f"the mixture weights of rollout {rollout.id} are {weights}: none may be negative, "
                "and one must be positive"
            )
        return [w / total for w in weights]


@dataclass(frozen=True)
class MixtureTeacher(Teacher):
    """The weighted mean of several teachers' distributions, all of them in this process: sum_i w_i
    pi_i(v), or with form "geometric" their product prod_i pi_i(v)^w_i, normalised (logits are
    averaged).
    """

    kind = "mixture"
    reads_spans = True
    of: dict[str, Any]  # name -> teacher
    # by name; or the data column that holds such a mapping per prompt; null: equal
    weights: dict[str, float] | str | None = None
    form: str = "arithmetic"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} must be one of {', '.join(FORMS)}")
        if len(self.of) < 2:
            raise ValueError("a mixture needs at least two teachers: of={a: MODEL, b: MODEL}")
        if isinstance(self.weights, dict):
            if set(self.weights) != set(self.of):
                raise ValueError(
                    f"weights name {', '.join(self.weights)}, the teachers are {', '.join(self.of)}"
                )
            if any(w < 0 for w in self.weights.values()) or not sum(self.weights.values()) > 0:
                raise ValueError("weights must not be negative, and at least one must be positive")

    def parsed(self, parse: Callable[[Any, str], Teacher], where: str) -> MixtureTeacher:
        members = {name: parse(value, f"{where}.of.{name}") for name, value in self.of.items()}
        for name, member in members.items():
            if not member.adds_up:
                raise UserError(
                    f"{where}.of.{name} is a {member.kind} teacher: a mixture adds up whole "
                    "distributions, so its teachers run in this process"
                )
        return replace(self, of=members)

    def said(self) -> dict[str, Any]:
        return super().said() | {"of": {name: member.said() for name, member in self.of.items()}}

    @property
    def adds_up(self) -> bool:
        return True

    @property
    def starts_student(self) -> bool:
        return any(member.starts_student for member in self.of.values())

    @property
    def views(self) -> tuple[View, ...]:
        return tuple(view for member in self.of.values() for view in member.views)

    def companions(self, model: str) -> Iterable[Companion]:
        members = (member.companions(f"{model}.{name}") for name, member in self.of.items())
        return (companion for several in members for companion in several)

    def says(self, fact: Fact, model: str) -> bool:
        return True

    def check(self, context: TeacherContext) -> None:
        for name, member in self.of.items():
            member.check(context.inside(name))

    def ends(self, context: TeacherContext) -> frozenset[int]:
        members = (member.ends(replace(context, given=None)) for member in self.of.values())
        return frozenset().union(*members)

    def open(self, context: TeacherContext) -> Scorer:
        members = {name: member.open(context.inside(name)) for name, member in self.of.items()}
        mixture = MixtureScorer(members, self.weights, self.form)
        if context.by_ids or not context.method.needs.spans("teacher"):
            return mixture
        return as_span_teacher(mixture, None, context.tokenizer, context.stops, context.questions)

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        return [
            held
            for name, member in self.of.items()
            for held in member.held(f"{role}.{name}", dtype, shape_of)
        ]

    def identity(self) -> Identity:
        members = {name: member.identity() for name, member in self.of.items()}
        weights = self.weights if self.form == "arithmetic" else [self.form, self.weights]
        return identify_together(members, weights)

    def precision(self, usual: str) -> str:
        return precisions(self.of.values(), usual)
