"""Several teachers discuss each question before they score the student's answers to it (MAD-OPD,
arXiv 2605.01347).

In the first round each answers alone; in a later one each sees all earlier rounds. A message ends
with <<CONFIDENCE=N>>, N from 0 to 100; the last such tag of a teacher's last message counts.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.annotators.base import AnnotateContext, Annotator
from opdkit.annotators.settings import AnnotatorContext, AnnotatorSettings
from opdkit.annotators.speaker import Question, Said, Speaker, open_speaker, user
from opdkit.annotators.text import question_of
from opdkit.base.rules import Rules, at_least, follow
from opdkit.types import Rollout, Sampling

MEMORY, COLUMN, CONFIDENCE, UNINFORMED = "debates", "debate", "confidence", "uninformed"
# in the place of the confidence of a teacher that said nothing: a softmax gives it no weight
FAILED = -math.inf
CLOSE = """End your message with one line of this form, in which N is a number from 0 to 100 that \
says how sure you are of your answer:
<<CONFIDENCE=N>>"""
FIRST = """You are teacher {me} of {count}. You will discuss the following task with the others; \
first answer it alone.

Task:
{prompt}

Give your reasoning and your answer. """
LATER = """You are teacher {me} of {count}, and discuss the following task with the others.

Task:
{prompt}

What has been said so far:

{said}

Point out errors, take over what is right, and give your reasoning and your answer as it is now. """
MESSAGE = "Teacher {me}, round {round}:\n{text}"
_TAG = re.compile(r"<<\s*CONFIDENCE\s*=\s*(\d{1,3}(?:\.\d+)?)\s*%?\s*>>", flags=re.IGNORECASE)
DEBATE: Rules = {
    "of": (lambda of: len(of) > 0, "at least one name", "they are who debates"),
    "rounds": at_least(1, "without a round nothing is said"),
    "temperature": (lambda t: t >= 0, "at least 0", "messages are drawn with it"),
    "max_tokens": at_least(1, "it is the tokens of one message"),
    "keep": at_least(0, "it is how many questions' debates are remembered"),
}


@dataclass(frozen=True)
class DebateSettings(AnnotatorSettings):
    """Writes the row's columns `debate`, the transcript, and `confidence`, a list with what each
    teacher says of itself in per cent, in the order of `of`: null where its last message names
    none, and minus infinity where it has no last message, so that a softmax of the list gives its
    weight to the others.

    Where no teacher said anything, the transcript is empty, each confidence null, and the mark
    `uninformed` stands on the whole response. A question is debated once, as long as it is among
    the last `keep` of them.
    """

    kind = "debate"
    columns = (COLUMN, CONFIDENCE)
    marks = (UNINFORMED,)
    # names of the run's models, or models in the words of a run's `teacher`
    of: tuple[str, ...] = ("teacher_1", "teacher_2")
    rounds: int = 2
    temperature: float = 0.7
    max_tokens: int = 1024  # of a message
    keep: int = 1024  # questions
    # what a teacher is asked in the first round and in a later one, and how a message stands in the
    # transcript: templates with {prompt}, {said}, {text}, {me}, {count}, {round}. One's own are
    # written out as they stand, also for a model without a chat template
    first: str = FIRST + CLOSE
    later: str = LATER + CLOSE
    message: str = MESSAGE

    def __post_init__(self) -> None:
        follow(DEBATE, self)
        check_form("first", self.first, "prompt", "me", "count", "round")
        check_form("later", self.later, "prompt", "said", "me", "count", "round")
        check_form("message", self.message, "text", "me", "count", "round")
        if len(set(self.of)) < len(self.of):
            raise ValueError(f"of={list(self.of)} names one teacher twice: each needs its own name")

    @property
    def writers(self) -> tuple[Any, ...]:
        return self.of

    def open(self, context: AnnotatorContext) -> Annotator:
        speakers = [open_speaker(name, context, "annotate.debate.of") for name in self.of]
        sampling = Sampling(temperature=self.temperature, max_completion_length=self.max_tokens)
        return Debate(self, dict(zip(self.of, speakers, strict=True)), sampling)


@dataclass(frozen=True)
class Debate(Annotator):
    """Debates of the questions of a step that are not remembered.

    speakers: by their names.
    """

    settings: DebateSettings
    speakers: Mapping[str, Speaker]
    sampling: Sampling

    def annotate(
        self, rollouts: Sequence[Rollout], context: AnnotateContext
    ) -> tuple[list[Rollout], Mapping[str, Any]]:
        known: dict[str, Any] = dict(context.memory.get(MEMORY, {}))
        asked = {_row_of(r): question_of(r) for r in rollouts}
        new = {id: text for id, text in asked.items() if id not in known}
        known |= self._debates(new, context.seed)
        kept = dict(list(known.items())[max(len(known) - self.settings.keep, 0) :])
        return [self._told(r, known[_row_of(r)]) for r in rollouts], {MEMORY: kept}

    def _told(self, rollout: Rollout, debate: Mapping[str, Any]) -> Rollout:
        confidence = [FAILED if c == "failed" else c for c in debate[CONFIDENCE]]
        row = {**rollout.row, COLUMN: debate[COLUMN], CONFIDENCE: confidence}
        nothing = [not debate[COLUMN]] * len(rollout.tokens)
        before = rollout.marks.get(UNINFORMED, [False] * len(nothing))
        marks = {UNINFORMED: [a or b for a, b in zip(before, nothing, strict=True)]}
        return replace(rollout, row=row, marks={**rollout.marks, **marks})

    def _debates(self, asked: Mapping[str, str], seed: int) -> dict[str, dict[str, Any]]:
        """What is said about each question, and how sure each teacher is at the end."""
        said: dict[str, list[str]] = {id: [] for id in asked}  # messages with who wrote them
        last: dict[str, list[Said]] = {id: [] for id in asked}
        for number in range(1, self.settings.rounds + 1 if asked else 1):
            turns = [
                self._turn(asked, said, number, me, name, seed)
                for me, name in enumerate(self.speakers, 1)
            ]
            for i, id in enumerate(asked):
                last[id] = [turn[i] for turn in turns]
                said[id] += [
                    self.settings.message.format(
                        me=me, count=len(turns), round=number, text=one.text
                    )
                    for me, one in enumerate(last[id], 1)
                    if one.text
                ]
        return {id: self._ended(said[id], last[id]) for id in asked}

    def _turn(
        self,
        asked: Mapping[str, str],
        said: Mapping[str, Sequence[str]],
        number: int,
        me: int,
        name: str,
        seed: int,
    ) -> list[Said]:
        """One teacher's messages of one round."""
        count = len(self.speakers)
        questions = []
        for id, prompt in asked.items():
            before = "\n\n".join(said[id])
            form = self.settings.later if before else self.settings.first
            text = form.format(me=me, count=count, round=number, prompt=prompt, said=before)
            plain = None if form in (FIRST + CLOSE, LATER + CLOSE) else text
            questions.append(Question(f"debate/{id}/{number}/{name}", user(text), plain))
        return self.speakers[name].say(questions, self.sampling, seed)

    def _ended(self, said: Sequence[str], last: Sequence[Said]) -> dict[str, Any]:
        if not any(one.text for one in last):
            return {COLUMN: "", CONFIDENCE: [None] * len(last)}
        return {
            COLUMN: "\n\n".join(said),
            CONFIDENCE: [confidence(one.text) if one.text else "failed" for one in last],
        }


def check_form(setting: str, form: str, *names: str) -> None:
    """A ValueError where a template names something else in braces."""
    try:
        named = [name for _, name, _, _ in string.Formatter().parse(form) if name is not None]
    except ValueError as error:
        raise ValueError(f"{setting} is no template ({error}): write other braces twice") from error
    if unknown := [name for name in named if name not in names]:
        raise ValueError(
            f"{setting} names {{{unknown[0]}}}, and only {', '.join(names)} can stand in braces "
            "there: write other braces twice"
        )
    if names[0] not in named:
        raise ValueError(f"{setting} does not name {{{names[0]}}}: put it in")


def _row_of(rollout: Rollout) -> str:
    """The row that was asked: the turns of one trajectory are one question, and a row each."""
    return str(rollout.row.get("id", rollout.question))


def confidence(message: str) -> float | None:
    """The last <<CONFIDENCE=N>> of a message, in per cent; None where there is none from 0 to
    100.
    """
    found = _TAG.findall(message)
    return float(found[-1]) if found and float(found[-1]) <= 100 else None
