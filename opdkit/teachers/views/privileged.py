"""A teacher that reads more than the student: it scores the same response tokens behind another
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Self

from torch import Tensor

from opdkit.base.config import plain
from opdkit.base.errors import UserError
from opdkit.data import Prompts
from opdkit.data.views import View, of_row
from opdkit.models.held import Held
from opdkit.models.identity import Identity
from opdkit.models.layout import Layout
from opdkit.models.shapes import Shape
from opdkit.objective.companion import Companion
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.head import Head
from opdkit.objective.needs import Needs
from opdkit.objective.supply import Tensors
from opdkit.teachers.base import (
    Longest,
    Remote,
    Scorer,
    cut,
    early,
    elsewhere,
    heads_of,
    longest_of,
    reads_of,
    tightest,
)
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.speech import VoiceElsewhere, VoiceHere
from opdkit.teachers.teacher import Teacher
from opdkit.types import DataRow, Rollout

Render = Callable[[DataRow], list[int]]  # a row's prompt as token ids
CLOSEST = 8  # of the longest questions by characters, those whose tokens are counted


@dataclass(frozen=True, eq=False)
class Viewed:
    """A scorer that reads each rollout's response behind its question as a view writes it.

    Response token t stays response token t, whatever the length of the prompt before it: flat
    positions are of responses. A rollout for which the view has nothing to show is read as it is.
    """

    scorer: Any
    view: View
    render: Render
    known: dict[str, list[int]] = field(default_factory=dict, repr=False)  # prompts by question

    @property
    def heads(self) -> Sequence[Head]:
        return heads_of(self.scorer)

    @property
    def reads(self) -> int | None:
        return reads_of(self.scorer)

    @property
    def elsewhere(self) -> bool:
        return elsewhere(self.scorer)

    def early(self, rollout: Rollout) -> bool:
        """Not where the view shows what is known of rollouts only once all are scored."""
        return not self.view.late and early(self.scorer, rollout)

    def cut(self, vocab: int | None) -> Self:
        """The same, its heads kept to the first rows."""
        return replace(self, scorer=cut(self.scorer, vocab))

    def source(self, layout: Layout, positions: Tensor) -> Any:
        """A `head.Source` (or one that answers like it) at flat positions [N]."""
        return self.scorer.source(self.laid_out(layout, positions), positions)

    def laid_out(self, layout: Layout, positions: Tensor) -> Layout:
        """The rollouts that have some of the flat positions [N], behind their other prompts."""
        asked = set((positions // max(layout.width, 1)).unique().tolist())
        return Layout(
            [
                self.seen(rollout, layout.rollouts) if b in asked else rollout
                for b, rollout in enumerate(layout.rollouts)
            ],
            layout.width,
        )

    def seen(self, rollout: Rollout, among: Sequence[Rollout]) -> Rollout:
        """A rollout behind the prompt that this teacher reads."""
        row = self.view.row(rollout, among)
        if row is None:
            return rollout
        prompt = self.tokens(row)
        length, limit = len(prompt) + len(rollout.tokens), self.reads
        if limit is not None and length > limit:
            raise UserError(
                f"with what the view {self.view} shows of rollout {rollout.id}, its prompt has "
                f"{len(prompt)} tokens and its response {len(rollout.tokens)}, and the teacher "
                f"reads {limit}: nothing is cut, as the teacher would judge another text. Show "
                "less (a template of your own), lower max_completion_length, or use a teacher with "
                "a longer context. Nothing was learnt from this step"
            )
        return replace(rollout, prompt=prompt, row=row)

    def tokens(self, row: DataRow) -> list[int]:
        """The ids of a prompt; those of what has been asked before are remembered."""
        if self.view.late:  # another text each time
            return self.render(row)
        key = f"{row.get('id')} {row['prompt']!r}"
        if key not in self.known:
            self.known[key] = self.render(row)
        return self.known[key]

    def longest(self, rows: Sequence[DataRow]) -> Longest:
        """The row with the longest prompt as this teacher reads it, of those that can be known
        before there are rollouts, its tokens, and how many the teacher reads.
        """
        written = [row for row in map(self.view.row, map(of_row, rows)) if row is not None]
        written.sort(key=lambda row: -len(str(row["prompt"])))
        lengths = {row["id"]: len(self.tokens(row)) for row in written[:CLOSEST]}
        row, length = max(lengths.items(), key=lambda item: item[1], default=("", 0))
        return tightest([(row, length, self.reads), longest_of(self.scorer, written)])


@dataclass(frozen=True, eq=False)
class ViewedRemote(Viewed):
    """The same of a model elsewhere, which answers with numbers."""

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N]; other models' `ids` [N, k]."""
        seen = self.laid_out(layout, positions)
        made: Tensors = self.scorer.facts(wanted, seen, positions, ids)
        return made


@dataclass(frozen=True)
class ViewedTeacher(Teacher):
    """A teacher of any kind behind a view: `{kind: ..., view: NAME}`."""

    kind = "viewed"
    of: Teacher
    view: View

    def said(self) -> dict[str, Any]:
        return {**self.of.said(), "view": plain(self.view)}

    @property
    def adds_up(self) -> bool:
        return self.of.adds_up

    @property
    def starts_student(self) -> bool:
        return self.of.starts_student

    @property
    def own_data(self) -> str | None:
        return self.of.own_data

    @property
    def routes(self) -> Mapping[str, Teacher]:
        return self.of.routes

    @property
    def views(self) -> tuple[View, ...]:
        return (self.view, *self.of.views)

    def companions(self, model: str) -> Iterable[Companion]:
        return self.of.companions(model)

    def says(self, fact: Fact, model: str) -> bool:
        return self.of.says(fact, model)

    def refuse(self, method: str, needs: Needs, model: str = "teacher") -> None:
        if self.of.own_data is not None:
            raise UserError(
                f"method {method!r} has its {model} read the view {self.view}, and a "
                f"{self.of.kind} teacher has scored its rollouts already, under the prompts that "
                "they had: set view: plain, and give the view to `opdkit cache-teacher`; or use a "
                "live teacher (teacher=MODEL)"
            )
        self.of.refuse(method, needs, model)

    def check(self, context: TeacherContext) -> None:
        self.of.check(context)

    def ends(self, context: TeacherContext) -> frozenset[int]:
        return self.of.ends(context)

    def open(self, context: TeacherContext) -> Scorer | Remote:
        asked = context.questions

        def render(row: DataRow) -> list[int]:
            return Prompts([row], context.tokenizer, **asked)[0].tokens

        scorer = self.of.open(context)
        made = ViewedRemote if isinstance(scorer, Remote) else Viewed
        return made(scorer, self.view, render)

    @property
    def writes(self) -> bool:
        return self.of.writes

    def voice(self, context: TeacherContext) -> VoiceHere | VoiceElsewhere:
        """Of the teacher itself: what it is asked to write, the view is no part of."""
        return self.of.voice(context)

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        return self.of.held(role, dtype, shape_of)

    def identity(self) -> Identity:
        return self._seen(self.of.identity())

    def recorded(self) -> Identity:
        return self._seen(self.of.recorded())

    def _seen(self, model: Identity) -> Identity:
        return behind(model, (self.view,))

    def precision(self, usual: str) -> str:
        return self.of.precision(usual)

    def lighter(self, dtype: str, decodes: bool) -> Iterator[tuple[str, Teacher]]:
        for setting, teacher in self.of.lighter(dtype, decodes):
            yield setting, replace(self, of=teacher)


def behind(model: Identity, views: Sequence[View]) -> Identity:
    """The identity of a model that reads questions under views: another one under others."""
    for view in views:
        template = " | ".join(view.templates)
        digest = model.digest and sha256(f"{model.digest} {template}".encode()).hexdigest()
        model = Identity(f"{model.name} that reads {template!r}", digest)
    return model
