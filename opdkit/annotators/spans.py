"""Key spans of right responses and error spans of wrong ones, as marks (TRACE, arXiv 2605.10194):
picked by rules, by a model, by a column of the data, or by a function of one's own.

Marks `key` and `error`; the row's column `span_types` names only the coarse types of a response's
spans ("calculation, step"), neither their text nor their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.annotators.arithmetic import Claim, claims
from opdkit.annotators.base import AnnotateContext, Annotator
from opdkit.annotators.settings import AnnotatorContext, AnnotatorSettings
from opdkit.annotators.speaker import Question, Speaker, open_speaker, user
from opdkit.annotators.text import Segment, Speller, Spelt, marked, question_of, segments
from opdkit.base.address import is_address, load_address, path_of
from opdkit.base.errors import UserError, nearest, shown
from opdkit.base.own_code import own_code
from opdkit.base.rules import Rules, at_least, follow
from opdkit.data.messages import parsed
from opdkit.rewards.extract import NUMBER, boxed, hashed, last_number, stated
from opdkit.types import Rollout, Sampling

KEY, ERROR = "key", "error"
# what kind of thing is at stake in a segment: the words that a model chooses from
TYPES = ("calculation", "logic", "setup", "understanding", "conclusion", "step", "other")
LABEL = 40  # characters of a type that a column or function of one's own gives
QUESTION = """Below are a problem and a {verdict} response to it, cut into numbered segments.

Problem:
{prompt}

Response:
{segments}

{wanted} Choose few: together they may be at most {share:.0f}% of the response. Write one line for \
each segment that you choose, its number and a type, and nothing else:
NUMBER: TYPE
where TYPE is one of {types}."""
WANTED = {
    KEY: "Which segments are the key steps, without which the answer would not have been found?",
    ERROR: "Which segments hold the first error, from which the wrong answer follows?",
}
_CHOICE = re.compile(r"^\W*(?:segment\s+)?(\d{1,4})\W+([a-z]+)", flags=re.IGNORECASE | re.MULTILINE)
SPANS: Rules = {
    "coverage": (
        lambda share: 0 < share <= 1,
        "above 0 and at most 1",
        "it is the share of a response's tokens that may be marked",
    ),
    "max_tokens": at_least(1, "it is the tokens of the model's answer"),
    "temperature": (lambda t: t >= 0, "at least 0", "the model's answer is drawn with it"),
}
FORMS = ("rules", "model", "column:NAME", "file.py:function")


@dataclass(frozen=True)
class Span:
    """Characters of a response, and a coarse type."""

    at: Segment
    type: str


@dataclass(frozen=True)
class SpanSettings(AnnotatorSettings):
    """Marks the spans of a response on which it turns.

    by: rules; model: `model` picks among numbered segments; column:NAME: the row has them as
    [[start, end, type], ...] in characters of the response; or file.py:function, which is given a
    rollout and returns such a list. At most `coverage` of the student's tokens are marked.
    """

    kind = "spans"
    main = "by"
    marks = (KEY, ERROR)
    columns = ("span_types",)
    reads_reward = True
    by: str = "rules"
    # who picks with by: model: student, a model, server:URL, or one of the run's models by name
    model: str | dict[str, Any] = "student"
    coverage: float = 0.25
    max_tokens: int = 256  # of the model's answer
    temperature: float = 0.0

    def __post_init__(self) -> None:
        follow(SPANS, self)
        if self.by in FORMS[:2] or self.column or is_address(self.by):
            return
        raise ValueError(
            f"by={shown(self.by)} is none of {', '.join(FORMS)}{nearest(self.by, list(FORMS[:2]))}"
        )

    @property
    def column(self) -> str:
        """The column that holds the spans; "" where none does."""
        kind, _, name = self.by.partition(":")
        return name if kind == "column" else ""

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,) if self.column else ()

    @property
    def writers(self) -> tuple[Any, ...]:
        return (self.model,) if self.by == "model" else ()

    @property
    def code(self) -> tuple[str, ...]:
        return (self.by,) if is_address(self.by) else ()

    def open(self, context: AnnotatorContext) -> Annotator:
        speller = Speller(context.teachers.tokenizer)
        _ = speller.spell([])  # a tokenizer whose tokens are no bytes is refused here
        pick: Pick
        if self.by == "model":
            pick = ByModel(self, open_speaker(self.model, context, "annotate.spans.model"))
        elif self.by == "rules":
            pick = by_rules
        elif self.column:
            pick = ByColumn(self.column)
        else:
            pick = ByOwn(self.by, load_address(self.by))
        return Spans(speller, self.coverage, pick)


# the spans of each rollout, the most telling first
Pick = Callable[[Sequence[tuple[Rollout, Spelt]], AnnotateContext], list[list[Span]]]


@dataclass(frozen=True)
class Spans(Annotator):
    """Writes the marks and the column from what `pick` says."""

    speller: Speller
    coverage: float
    pick: Pick

    def annotate(
        self, rollouts: Sequence[Rollout], context: AnnotateContext
    ) -> tuple[list[Rollout], Mapping[str, Any]]:
        spelt = [(r, self.speller.spell(r.tokens)) for r in rollouts]
        picked = self.pick(spelt, context)
        return [self._marked(r, text, s) for (r, text), s in zip(spelt, picked, strict=True)], {}

    def _marked(self, rollout: Rollout, text: Spelt, spans: Sequence[Span]) -> Rollout:
        chosen, types = covered(rollout, text, spans, self.coverage)
        name, other = (KEY, ERROR) if rollout.correct else (ERROR, KEY)
        marks = {name: marked(len(rollout.tokens), chosen), other: [False] * len(rollout.tokens)}
        row = {**rollout.row, "span_types": ", ".join(dict.fromkeys(types))}
        return replace(rollout, marks={**rollout.marks, **marks}, row=row)


def covered(
    rollout: Rollout, text: Spelt, spans: Iterable[Span], coverage: float
) -> tuple[set[int], list[str]]:
    """The student's tokens that spans touch, and the types of these spans: one after the other, as
    far as they fit into the share of its tokens that may be marked. Where the first is too long, it
    is cut to its last tokens that fit.
    """
    drawn = rollout.drawn
    room = int(coverage * sum(drawn))
    chosen: set[int] = set()
    types: list[str] = []
    for span in spans:
        new = [t for t in text.tokens(span.at) if drawn[t] and t not in chosen]
        if not chosen:
            new = new[max(len(new) - room, 0) :]
        if new and len(chosen) + len(new) <= room:
            chosen |= set(new)
            types.append(span.type)
    return chosen, types


# ----------------------------------------------------------------------------------------- by rules


def by_rules(
    rollouts: Sequence[tuple[Rollout, Spelt]], context: AnnotateContext
) -> list[list[Span]]:
    """See `key_spans` and `error_spans`."""
    return [
        key_spans(text.text) if rollout.correct else error_spans(text.text)
        for rollout, text in rollouts
    ]


def key_spans(text: str) -> list[Span]:
    """Segments before the one that gives the final answer: first those with a true equation that
    holds a number of the answer, then those with another equation, then those with a number of the
    answer; of each, the one nearest to the answer first.
    """
    before, numbers = _before_answer(text)
    ranked: list[tuple[int, Span]] = []
    for segment in before:
        said = text[segment.start : segment.end]
        holds = bool(numbers & _numbers(said))
        equation = "=" in said
        true = any(claim.true for claim in claims(said))
        if equation or holds:
            rank = 0 if true and holds else 1 if equation else 2
            ranked.append((rank, Span(segment, "calculation" if equation else "step")))
    ranked.reverse()
    return [span for _, span in sorted(ranked, key=lambda pair: pair[0])]


def error_spans(text: str) -> list[Span]:
    """The first segment whose stated arithmetic is false; where none is, the last segment before
    the one that gives the final answer.
    """
    for segment in segments(text):
        if not all(claim.true for claim in _claims_of(text, segment)):
            return [Span(segment, "calculation")]
    before, _ = _before_answer(text)
    return [Span(segment, "step") for segment in before[-1:]]


def _claims_of(text: str, segment: Segment) -> list[Claim]:
    return list(claims(text[segment.start : segment.end]))


def _before_answer(text: str) -> tuple[list[Segment], set[str]]:
    """The segments before the one that gives the final answer (all, where it is the only one), and
    the numbers of that answer.
    """
    every = segments(text)
    answer = boxed(text) or hashed(text) or stated(text) or last_number(text) or ""
    at = text.rfind(answer) if answer else len(text)
    before = [s for s in every if s.end <= at]
    if before == every:
        before = every[:-1]
    return before or every, _numbers(answer)


def _numbers(text: str) -> set[str]:
    """Numbers as plain digits: 1,000 and 1000 are one."""
    return {re.sub(r"[^\d.]", "", found).rstrip(".") for found in NUMBER.findall(text)} - {""}


# ---------------------------------------------------------------------------------------- by others


@dataclass(frozen=True)
class ByModel:
    """A model picks among numbered segments; of its answer only numbers and known types are
    read.
    """

    settings: SpanSettings
    speaker: Speaker

    def __call__(
        self, rollouts: Sequence[tuple[Rollout, Spelt]], context: AnnotateContext
    ) -> list[list[Span]]:
        cut = [segments(text.text) for _, text in rollouts]
        questions = [
            Question(f"spans/{rollout.id}", user(self._ask(rollout, text.text, parts)))
            for (rollout, text), parts in zip(rollouts, cut)
        ]
        settings = self.settings
        sampling = Sampling(
            temperature=settings.temperature, max_completion_length=settings.max_tokens
        )
        said = self.speaker.say(questions, sampling, context.seed)
        return [chosen(one.text, parts) for one, parts in zip(said, cut)]

    def _ask(self, rollout: Rollout, text: str, parts: Sequence[Segment]) -> str:
        numbered = "\n".join(f"[{i}] {text[s.start : s.end]}" for i, s in enumerate(parts, 1))
        return QUESTION.format(
            verdict="correct" if rollout.correct else "wrong",
            prompt=question_of(rollout),
            segments=numbered,
            wanted=WANTED[KEY if rollout.correct else ERROR],
            share=100 * self.settings.coverage,
            types=", ".join(TYPES),
        )


def chosen(said: str, parts: Sequence[Segment]) -> list[Span]:
    """The segments that an answer names, each once, in its order; numbers of none are left out, and
    unknown types are "other".
    """
    spans: dict[int, Span] = {}
    for number, name in _CHOICE.findall(said):
        if 1 <= int(number) <= len(parts):
            kind = name.lower() if name.lower() in TYPES else "other"
            spans.setdefault(int(number), Span(parts[int(number) - 1], kind))
    return list(spans.values())


@dataclass(frozen=True)
class ByColumn:
    """The row has the spans."""

    column: str

    def __call__(
        self, rollouts: Sequence[tuple[Rollout, Spelt]], context: AnnotateContext
    ) -> list[list[Span]]:
        return [
            listed(rollout.row.get(self.column), rollout, text, f"the column {self.column!r}")
            for rollout, text in rollouts
        ]


@dataclass(frozen=True)
class ByOwn:
    """A function of one's own, in this process."""

    address: str
    function: Callable[[Rollout], Any]

    def __call__(
        self, rollouts: Sequence[tuple[Rollout, Spelt]], context: AnnotateContext
    ) -> list[list[Span]]:
        found = []
        for rollout, text in rollouts:
            who = f"{self.address} on rollout {rollout.id!r}"
            with own_code(f"the annotator {who} failed", path_of(self.address)):
                given = self.function(rollout)
            found.append(listed(given, rollout, text, self.address))
        return found


def listed(value: Any, rollout: Rollout, text: Spelt, who: str) -> list[Span]:
    """[[start, end, type], ...] in characters of the rollout's text, also written as JSON; ends
    behind the response's are its end.
    """
    given = parsed(value) if isinstance(value, str) and value.strip() else value
    shift = text.shift(rollout)
    spans = []
    for one in given or ():
        good = isinstance(one, list | tuple) and len(one) == 3
        if not good or not all(type(x) is int for x in one[:2]) or not 0 <= one[0] <= one[1]:
            raise UserError(
                f"{who} gives rollout {rollout.id!r} the span {shown(one)}: write [start, end, "
                'type], characters of the response from start up to end, such as [10, 24, "step"]'
            )
        start, end = (min(max(x + shift, 0), len(text.text)) for x in one[:2])
        spans.append(Span(Segment(start, end), str(one[2])[:LABEL]))
    return spans
