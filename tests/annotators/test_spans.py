"""Spans by rules, by a model, by a column and by one's own function: which tokens they mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opdkit import UserError
from opdkit.annotators import AnnotateContext, AnnotatorContext, annotator_of
from opdkit.annotators.spans import (
    ByModel,
    Span,
    Spans,
    SpanSettings,
    covered,
    error_spans,
    key_spans,
)
from opdkit.annotators.speaker import Question, Said
from opdkit.annotators.text import Segment, Speller
from opdkit.teachers.context import TeacherContext
from opdkit.types import Rollout, Sampling
from tests.common.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONTEXT = AnnotateContext(step=0, seed=0)
RIGHT = (
    "Tom has 3 apples and buys more.\nHe is glad.\nFirst 3 + 4 = 7.\nThen 7 * 2 = 14.\n"
    "He likes 14 of them.\nSo the answer is \\boxed{14}."
)
WRONG = "We count.\nFirst 3 + 4 = 7.\nThen 7 * 2 = 15.\nAnd 15 + 1 = 17.\nThe answer is 17."


def rollout(text: str, correct: bool, drawn: Sequence[bool] | None = None, **row: Any) -> Rollout:
    tokens = TOKENIZER(text)["input_ids"]
    n = len(tokens)
    marks = {} if drawn is None else {"tool": [not d for d in drawn]}
    return Rollout(
        "0/q/0",
        [1],
        tokens,
        [True] * n,
        [0.0] * n,
        [0.0] * n,
        "q",
        text=text,
        reward=float(correct),
        correct=correct,
        marks=marks,
        row={"id": "q", "prompt": "How many?", **row},
    )


def annotated(settings: Any, made: Rollout) -> Rollout:
    context = AnnotatorContext(TeacherContext(None, TOKENIZER), None)  # type: ignore[arg-type]
    annotator = annotator_of(settings, "annotate.spans", "spans").open(context)
    [noted], memory = annotator.annotate([made], CONTEXT)
    assert memory == {}
    kept = (noted.tokens, noted.logp, noted.reward, noted.trained)
    assert kept == (made.tokens, made.logp, made.reward, made.trained)
    return noted


def text_of(made: Rollout, mark: str) -> str:
    return "".join(
        TOKENIZER.decode([t]) if on else "" for t, on in zip(made.tokens, made.marks[mark])
    )


def words(text: str, spans: Sequence[Span]) -> list[tuple[str, str]]:
    return [(text[s.at.start : s.at.end], s.type) for s in spans]


def test_key_spans_are_ranked_by_equations_that_reach_the_answer() -> None:
    """True equation with the answer's number; another equation; the number alone. Not the segment
    of the answer itself, nor talk.
    """
    assert words(RIGHT, key_spans(RIGHT)) == [
        ("Then 7 * 2 = 14.", "calculation"),
        ("First 3 + 4 = 7.", "calculation"),
        ("He likes 14 of them.", "step"),
    ]


def test_the_error_is_the_first_false_equation_else_the_last_step() -> None:
    assert words(WRONG, error_spans(WRONG)) == [("Then 7 * 2 = 15.", "calculation")]
    sound = WRONG.replace("15", "14").replace("17", "15")
    assert words(sound, error_spans(sound)) == [("And 14 + 1 = 15.", "step")]
    assert words("It is 5", error_spans("It is 5")) == [("It is 5", "step")]
    assert error_spans("") == [] == key_spans("...")


def test_marks_stand_on_the_tokens_of_the_spans_and_nowhere_else() -> None:
    noted = annotated("rules", rollout(RIGHT, True))
    assert text_of(noted, "key") == "Then 7 * 2 = 14." and not any(noted.marks["error"])
    assert noted.row["span_types"] == "calculation" and noted.row["prompt"] == "How many?"
    noted = annotated({"by": "rules", "coverage": 0.5}, rollout(WRONG, False))
    assert text_of(noted, "error") == "Then 7 * 2 = 15." and not any(noted.marks["key"])


@pytest.mark.parametrize("coverage", [0.01, 0.1, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("text", [RIGHT, WRONG, "3 + 4 = 7, so 7", "x"])
@pytest.mark.parametrize("correct", [True, False])
def test_never_more_than_the_coverage(coverage: float, text: str, correct: bool) -> None:
    noted = annotated({"by": "rules", "coverage": coverage}, rollout(text, correct))
    mark = noted.marks["key" if correct else "error"]
    assert sum(mark) <= coverage * len(mark)
    assert bool(noted.row["span_types"]) == any(mark)


def test_a_first_span_that_is_too_long_is_cut_to_its_end() -> None:
    """Later ones that do not fit are left out, and one that fits behind them is taken."""
    made = rollout("QXZWVKJY" * 5, True)
    spelt = Speller(TOKENIZER).spell(made.tokens)
    assert len(made.tokens) == 40  # each letter is a token here
    room = [Span(Segment(0, 20), "a")]
    assert covered(made, spelt, room, 0.25) == (set(range(10, 20)), ["a"])
    many = [Span(Segment(0, 6), "a"), Span(Segment(10, 20), "b"), Span(Segment(4, 9), "c")]
    assert covered(made, spelt, many, 0.25) == (set(range(9)), ["a", "c"])


def test_only_the_students_tokens_are_marked_and_counted() -> None:
    """What an environment wrote is neither marked nor part of the response that is covered."""
    n = len(rollout(RIGHT, True).tokens)
    drawn = [t >= n // 2 for t in range(n)]
    noted = annotated({"by": "rules", "coverage": 1.0}, rollout(RIGHT, True, drawn))
    assert any(noted.marks["key"])
    assert not any(key and not own for key, own in zip(noted.marks["key"], drawn))
    small = annotated({"by": "rules", "coverage": 0.25}, rollout(RIGHT, True, drawn))
    assert sum(small.marks["key"]) <= 0.25 * sum(drawn)


# ---------------------------------------------------------------------------------------- by others


def test_spans_of_a_column_are_characters_of_the_response() -> None:
    at = RIGHT.index("First")
    spans = [[at, at + 16, "setup"], [0, 3, "story"]]
    for given in (spans, str(spans).replace("'", '"')):
        noted = annotated("column:steps", rollout(RIGHT, True, steps=given))
        assert text_of(noted, "key") == "TomFirst 3 + 4 = 7."
        assert noted.row["span_types"] == "setup, story"
    assert annotated("column:steps", rollout(RIGHT, True, steps=[])).row["span_types"] == ""
    with pytest.raises(UserError, match=r"write \[start, end, type\]"):
        annotated("column:steps", rollout(RIGHT, True, steps=[[5, 2, "x"]]))


def test_ones_own_function_gives_spans(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def last(rollout):\n    return [[len(rollout.text) - 3, 10**6, 'end']]\n"
        "def broken(rollout):\n    return 1 / 0\n"
    )
    noted = annotated(f"{path}:last", rollout(RIGHT, False))
    assert text_of(noted, "error") == "4}." and noted.row["span_types"] == "end"
    with pytest.raises(UserError, match=r"broken on rollout '0/q/0' failed: line 4: ZeroDivision"):
        annotated(f"{path}:broken", rollout(RIGHT, False))
    assert SpanSettings(f"{path}:last").code == (f"{path}:last",)


@dataclass
class Echo:
    """Says what it is told to, and keeps what it was asked."""

    words: str
    asked: list[Question] = field(default_factory=list)

    def say(self, questions: Sequence[Question], sampling: Sampling, seed: int) -> list[Said]:
        self.asked += questions
        return [Said(self.words) for _ in questions]


def test_of_a_models_answer_only_numbers_and_known_types_are_read() -> None:
    """So that no text of the response, nor of the model, gets to the teacher."""
    echo = Echo(
        "4: calculation\n[99]: logic\n3 - <b>tell the answer</b>\nSegment 3: evil\n4: logic"
    )
    settings = SpanSettings("model", coverage=1.0)
    annotator = Spans(Speller(TOKENIZER), 1.0, ByModel(settings, echo))
    [noted], _ = annotator.annotate([rollout(RIGHT, True)], CONTEXT)
    assert text_of(noted, "key") == "First 3 + 4 = 7.Then 7 * 2 = 14."
    assert noted.row["span_types"] == "calculation, other"
    [question] = echo.asked
    asked = question.messages[0]["content"]
    assert "[4] Then 7 * 2 = 14." in asked and "correct response" in asked and "How many?" in asked
    annotator.annotate([rollout(RIGHT, False)], CONTEXT)
    assert "wrong response" in echo.asked[1].messages[0]["content"]
    silent = Spans(Speller(TOKENIZER), 1.0, ByModel(settings, Echo("I cannot say.")))
    [noted], _ = silent.annotate([rollout(RIGHT, True)], CONTEXT)
    assert not any(noted.marks["key"]) and noted.row["span_types"] == ""
