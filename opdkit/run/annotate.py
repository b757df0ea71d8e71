"""The annotators of a run: what it says over what its method brings, refused where they cannot
work, and opened beside the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdkit.annotators import (
    KINDS,
    Annotator,
    AnnotatorContext,
    AnnotatorSettings,
    annotators_of,
)
from opdkit.annotators.speaker import writer_of
from opdkit.annotators.uninformed import Uninformed
from opdkit.base.errors import UserError, nearest
from opdkit.curricula import writer_of as curriculum_writer
from opdkit.methods.method import Method
from opdkit.models.limits import context_limit
from opdkit.run.opened import Opened
from opdkit.run.settings import Run
from opdkit.sampling.kv_cache import odd_layers
from opdkit.teachers.teacher import Teacher
from opdkit.types import MARK_OF, DataRow, Sampler

# marks that a run writes itself: filters, and views of a teacher that lack their pieces
OWN_MARKS = frozenset({*MARK_OF.values(), "newline", "uninformed"})


def annotations_of(run: Run, method: Method) -> dict[str, AnnotatorSettings]:
    """The run's annotators by name."""
    return annotators_of(run.annotate, method.annotate)


def models_by_name(run: Run) -> dict[str, Any]:
    """What annotators may call the run's models, in the words of its `teacher`."""
    return {**run.models, "teacher": run.teacher}


def writers_for(
    run: Run, name: str, settings: AnnotatorSettings, who: str = ""
) -> dict[str, Teacher]:
    """The models, the student apart, that write text for an annotator, by what it calls them; `who`
    begins an error.
    """
    found = {
        str(spec): writer_of(spec, models_by_name(run), f"{who}annotate.{name}")
        for spec in settings.writers
    }
    return {spec: writer for spec, writer in found.items() if writer is not None}


def refuse_annotations(
    run: Run, method: Method, annotated: Mapping[str, AnnotatorSettings], scored: bool
) -> None:
    """What cannot work, before any model is loaded. scored: whether the run has a reward."""
    _refuse_twice(annotated)
    for name, settings in annotated.items():
        if settings.reads_reward and not scored:
            raise UserError(
                f"annotate.{name} ({settings.kind}) goes by the rewards of responses, and the run "
                f"has none: set reward, or switch it off with annotate.{name}=null"
            )
        # who cannot write is refused
        writers_for(run, name, settings, f"method {method.name or 'own'!r}: ")
    _refuse_unmarked(method, annotated)


def _refuse_twice(annotated: Mapping[str, AnnotatorSettings]) -> None:
    """Two annotators that write the same: the later one would undo the other's."""
    by: dict[str, str] = {}
    for name, settings in annotated.items():
        for column in settings.columns:
            if column in by:
                raise UserError(
                    f"annotate.{by[column]} and annotate.{name} both write the column {column!r}, "
                    "and only one can hold: leave one out, or switch it off with "
                    f"annotate.{name}=null"
                )
            by[column] = name


def _refuse_unmarked(method: Method, annotated: Mapping[str, AnnotatorSettings]) -> None:
    """Marks that a method reads and nobody writes: no token would ever have them."""
    read = {c.removeprefix("mark:") for c in method.needs.columns if c.startswith("mark:")}
    written = {mark for settings in annotated.values() for mark in settings.marks}
    writer = curriculum_writer(method.curriculum)
    # one's own writer may set any marks
    if _is_own(writer):
        return
    for mark in sorted(read - written - writer.marks - method.curriculum.marks - OWN_MARKS):
        kinds = [kind for kind, settings in KINDS.items() if mark in settings.marks]
        known = sorted({m for settings in KINDS.values() for m in settings.marks} | OWN_MARKS)
        how = (
            f"annotate.{kinds[0]}=..., such as annotate.{kinds[0]}={{kind: {kinds[0]}}}"
            if kinds
            else f"an annotator of one's own{nearest(mark, known)}"
        )
        raise UserError(
            f"method {method.name or 'own'!r} reads the mark {mark!r} of tokens, and nothing in "
            f"this run writes it, so that no token would ever have it: say who writes it: {how}"
        )


def _is_own(part: Any) -> bool:
    return not type(part).__module__.startswith("opdkit.")


def refuse_rows(annotated: Mapping[str, AnnotatorSettings], rows: Sequence[DataRow]) -> None:
    """Rows without a column that an annotator reads."""
    for name, settings in annotated.items():
        for column in settings.reads:
            for row in rows:
                if row.get(column) is None:
                    raise UserError(
                        f"annotate.{name} reads the column {column!r}, and row {row['id']!r} has "
                        f"none{nearest(column, list(row))} (columns: {', '.join(row)}): add it to "
                        "the data, or name another"
                    )


def open_annotators(
    run: Run,
    method: Method,
    annotated: Mapping[str, AnnotatorSettings],
    opened: Opened,
    sampler: Sampler,
) -> tuple[Annotator, ...]:
    """The annotators, with the models they ask; last, as it looks at what the others noted, the one
    that marks what the teacher's view has nothing to show for.

    sampler: the run's own; it also writes texts where the student is not sampled in this process.
    """
    views = run.teachers.views
    blind = views and "mark:uninformed" in method.needs.columns
    last = (Uninformed(tuple(dict.fromkeys(views))),) if blind else ()
    if not annotated:
        return last
    student = opened.student.model
    here = run.sampler_settings.on_student and not odd_layers(student)
    context = AnnotatorContext(
        opened.models.context,
        opened.sampler() if here else sampler,
        context_limit(student.config),
        models_by_name(run),
        opened.scorers["student"] if here else None,
    )
    return (*(settings.open(context) for settings in annotated.values()), *last)
