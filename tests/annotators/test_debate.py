"""Teachers who debate: who hears what, whose confidence counts, and who fails."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from opdkit.annotators import AnnotateContext
from opdkit.annotators.debate import Debate, DebateSettings, confidence
from opdkit.annotators.speaker import Question, Said
from opdkit.base import exact
from opdkit.types import Rollout, Sampling


@dataclass
class Script:
    """Says what a function makes of a question; keeps what it was asked."""

    words: Callable[[Question], str]
    asked: list[Question] = field(default_factory=list)

    def say(self, questions: Sequence[Question], sampling: Sampling, seed: int) -> list[Said]:
        self.asked += questions
        said = [self.words(q) for q in questions]
        return [Said(text, "" if text else "nothing came") for text in said]


def rollout(question: str, number: int = 0) -> Rollout:
    return Rollout(
        f"0/{question}/{number}",
        [1],
        [5, 6],
        [True] * 2,
        [0.0] * 2,
        [0.0] * 2,
        question,
        row={"id": question, "prompt": f"What is {question}?"},
    )


def debate(*speakers: Script, **settings: Any) -> Debate:
    names = tuple(f"teacher_{i}" for i in range(1, len(speakers) + 1))
    made = DebateSettings(names, **settings)
    return Debate(made, dict(zip(names, speakers)), Sampling(temperature=made.temperature))


def context(memory: dict[str, Any] | None = None) -> AnnotateContext:
    return AnnotateContext(0, 7, memory=memory or {})


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ("It is 4.\n<<CONFIDENCE=90>>", 90.0),
        ("<<CONFIDENCE=90>> no:\n<<confidence = 60 %>>", 60.0),
        ("<<CONFIDENCE=0>>", 0.0),
        ("<<CONFIDENCE=37.5>>", 37.5),
        ("<<CONFIDENCE=90>> then <<CONFIDENCE=900>>", None),
        ("<<CONFIDENCE=-3>>", None),
        ("CONFIDENCE=90", None),
        ("<<CONFIDENCE=high>>", None),
        ("", None),
    ],
)
def test_the_last_tag_counts(message: str, value: float | None) -> None:
    assert confidence(message) == value


def test_round_one_is_alone_and_later_ones_hear_all_before() -> None:
    def talk(me: str, sure: int) -> Callable[[Question], str]:
        return lambda q: f"{me} says {q.id}\n<<CONFIDENCE={sure if '/2/' in q.id else 1}>>"

    one, two = Script(talk("one", 90)), Script(talk("two", 60))
    noted, memory = debate(one, two).annotate(
        [rollout("a"), rollout("a", 1), rollout("b")], context()
    )
    assert [q.id for q in one.asked] == [
        "debate/a/1/teacher_1",
        "debate/b/1/teacher_1",
        "debate/a/2/teacher_1",
        "debate/b/2/teacher_1",
    ]
    first, _, second, _ = (q.messages[0]["content"] for q in two.asked)
    assert "one says" not in first and "What is a?" in first
    assert "one says debate/a/1" in second and "two says debate/a/1" in second
    assert "debate/b/" not in second and "/2/" not in second
    assert all(q.messages[0]["content"].endswith("<<CONFIDENCE=N>>") for q in one.asked + two.asked)
    a, again, b = noted
    assert a.row["confidence"] == [90.0, 60.0] and a.row == {**again.row}
    said = re.findall(r"(one|two) says debate/(.)/(\d)", a.row["debate"])
    assert said == [("one", "a", "1"), ("two", "a", "1"), ("one", "a", "2"), ("two", "a", "2")]
    assert "debate/a" not in b.row["debate"] and not any(a.marks["uninformed"])
    # the card's weights
    w = [math.exp(c / 100) for c in a.row["confidence"]]
    assert round(w[0] / sum(w), 6) == 0.574443
    assert list(memory["debates"]) == ["a", "b"]


def test_turns_of_a_trajectory_are_debated_each() -> None:
    """They answer one question, the trajectory, and each has a row of its own."""
    one = Script(lambda q: f"{q.id} <<CONFIDENCE=50>>")
    turns = [replace(rollout(f"t:turn{n}"), question="t") for n in (1, 2)]
    noted, memory = debate(one, rounds=1).annotate(turns, context())
    assert [q.id for q in one.asked] == ["debate/t:turn1/1/teacher_1", "debate/t:turn2/1/teacher_1"]
    assert ["turn1" in r.row["debate"] for r in noted] == [True, False]
    assert list(memory["debates"]) == ["t:turn1", "t:turn2"]


def test_a_question_is_debated_once() -> None:
    """What is remembered is plain JSON, and gives the same columns; beyond `keep` the oldest go."""
    one = Script(lambda q: f"{q.id} <<CONFIDENCE=50>>")
    made = debate(one, rounds=1, keep=2)
    noted, memory = made.annotate([rollout("a"), rollout("b")], context())
    kept = exact.loads(exact.dumps(memory))
    assert kept == memory == json.loads(json.dumps(memory)) and len(one.asked) == 2
    again, memory = made.annotate([rollout("a"), rollout("c")], context(kept))
    assert len(one.asked) == 3 and again[0].row == noted[0].row
    assert list(memory["debates"]) == ["b", "c"]


def test_who_says_no_confidence_has_none_and_who_fails_has_no_weight() -> None:
    """Null makes the weights uniform; minus infinity gives a teacher's weight to the others."""
    sure = Script(lambda q: "It is 4. <<CONFIDENCE=80>>")
    shy = Script(lambda q: "It is 5.")
    fails = Script(lambda q: "" if "/2/" in q.id else "Hm. <<CONFIDENCE=99>>")
    [noted], _ = debate(sure, shy).annotate([rollout("a")], context())
    assert noted.row["confidence"] == [80.0, None]
    [noted], memory = debate(sure, fails).annotate([rollout("a")], context())
    assert noted.row["confidence"] == [80.0, -math.inf] and not any(noted.marks["uninformed"])
    assert "Hm." in noted.row["debate"]
    assert "inf" not in json.dumps(memory, allow_nan=False)


def test_where_all_fail_the_response_is_uninformed() -> None:
    fails = Script(lambda q: "")
    made, _ = debate(fails, fails).annotate([rollout("a")], context())
    assert made[0].row["debate"] == "" and made[0].row["confidence"] == [None, None]
    assert made[0].marks["uninformed"] == [True, True]


def test_templates_of_ones_own() -> None:
    """They are asked as they stand, also of a model without a chat template."""
    one = Script(lambda q: f"said {q.id[-9:]}")
    made = debate(
        one, first="{prompt}!", later="{said}|{prompt}{{}}", message="{me}.{round}: {text}"
    )
    [noted], _ = made.annotate([rollout("a")], context())
    first, second = one.asked
    assert first.plain == first.messages[0]["content"] == "What is a?!"
    assert second.plain == "1.1: said teacher_1|What is a?{}"
    assert noted.row["debate"] == "1.1: said teacher_1\n\n1.2: said teacher_1"
    usual = Script(lambda q: "x")
    debate(usual).annotate([rollout("a")], context())
    assert [q.plain for q in usual.asked] == [None, None]
    for wrong in (
        {"first": "{said}"},
        {"first": "no"},
        {"message": "{text"},
        {"later": "{prompt.x}"},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} "):
            DebateSettings(("a",), **wrong)
