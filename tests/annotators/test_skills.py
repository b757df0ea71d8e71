"""Skills: what is written of a trajectory, which one a task's teacher reads, and what they earn."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from opdkit.annotators import AnnotateContext, AnnotatorContext
from opdkit.annotators.skills import (
    EXPLORE,
    LONGEST,
    Skills,
    SkillSettings,
    best,
    credited,
    read_skill,
)
from opdkit.teachers.context import TeacherContext
from opdkit.types import Rollout
from tests.common.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def rollout(task: str, reward: float, text: str = "a", number: int = 0, **more: Any) -> Rollout:
    tokens = TOKENIZER(text)["input_ids"]
    n = len(tokens)
    return Rollout(
        f"0/{task}/{number}",
        [1],
        tokens,
        [True] * n,
        [0.0] * n,
        [0.0] * n,
        task,
        text=text,
        reward=reward,
        correct=reward > 0,
        row={"id": task, "prompt": task},
        **more,
    )


def store(keep: int = 8, tasks: int = 1024) -> Skills:
    """Each trajectory's skill is its text."""
    return Skills(SkillSettings(keep=keep, tasks=tasks), lambda given, _: [r.text for r in given])


def step(skills: Skills, memory: Any, *rollouts: Rollout) -> tuple[list[str], dict[str, Any]]:
    noted, more = skills.annotate(rollouts, AnnotateContext(0, 0, memory=memory))
    assert [r.tokens for r in noted] == [r.tokens for r in rollouts]
    assert json.loads(json.dumps(more)) == more
    return [r.row["skill"] for r in noted], {**memory, **more}


def test_a_skill_is_read_from_the_next_step_on() -> None:
    """Empty right after the first trajectories; of those the better one's is told."""
    said, memory = step(store(), {}, rollout("t", 0.0, "bad"), rollout("t", 1.0, "good", 1))
    assert said == ["", ""]
    frozen = json.dumps(memory)
    said, later = step(store(), memory, rollout("t", 1.0, "x"), rollout("u", 1.0, "y"))
    assert said == ["good", ""]
    assert json.dumps(memory) == frozen  # what was handed over is not written to
    assert [s["text"] for s in later["skills"]["t"]["skills"]] == ["bad", "good", "x"]


def test_rewards_go_to_the_skill_that_was_read_before_them() -> None:
    """Its mean over its own trajectory (1.0) and the two means (0.5, then 0.0) of those it led to:
    at the third meeting (1 + 0.5) / 2, at the fourth (1 + 0.5 + 0) / 3.
    """
    cut: dict[str, Any] = {"finish": "length"}  # writes no skill
    _, memory = step(store(), {}, rollout("t", 1.0, "good"))
    assert memory["skills"]["t"]["skills"] == [{"text": "good", "mean": 1.0, "count": 1}]
    said, memory = step(store(), memory, rollout("t", 0.3, "a", **cut))
    assert said == ["good"] and memory["skills"]["t"]["skills"][0]["count"] == 1  # not yet
    _, memory = step(store(), memory, rollout("t", 1.0, **cut), rollout("t", 0.0, "b", 1, **cut))
    assert memory["skills"]["t"]["skills"] == [{"text": "good", "mean": 0.75, "count": 2}]
    _, memory = step(store(), memory, rollout("t", 0.0, **cut))
    assert memory["skills"]["t"]["skills"] == [{"text": "good", "mean": 0.5, "count": 3}]


def test_the_upper_confidence_bound_by_hand() -> None:
    """Means 0.9 and 0.6, counts 8 and 1, N = 9: 0.9 + 0.5 sqrt(ln 10 / 8) = 1.1682 and
    0.6 + 0.5 sqrt(ln 10) = 1.3587, so the rare one; at counts 8 and 8 the better one.
    """
    assert EXPLORE == 0.5
    often = {"text": "often", "mean": 0.9, "count": 8}
    rare = {"text": "rare", "mean": 0.6, "count": 1}
    assert round(0.9 + 0.5 * math.sqrt(math.log(10) / 8), 4) == 1.1682
    assert round(0.6 + 0.5 * math.sqrt(math.log(10)), 4) == 1.3587
    assert best([often, rare]) == "rare" and best([often, {**rare, "count": 8}]) == "often"
    assert best([]) == ""
    # with the same rewards again and again, each is read ever again: none is starved
    skills, read = [often, rare], []
    for _ in range(200):
        read.append(best(skills))
        skills = credited(skills, read[-1], 0.5)
    assert min(read.count("often"), read.count("rare")) > 50


def test_the_store_is_bounded() -> None:
    """Of a task the skill of the lowest mean goes, but not the one being read; of tasks the one
    that was not met for longest.
    """
    memory: dict[str, Any] = {}
    small = store(keep=2, tasks=2)
    for i, reward in enumerate((0.1, 0.9, 0.5, 0.7)):
        _, memory = step(small, memory, rollout("t", reward, f"s{i}"))
        assert len(memory["skills"]["t"]["skills"]) <= 2
    task = memory["skills"]["t"]
    assert task["read"] in [s["text"] for s in task["skills"]]
    for name in ("u", "t", "v"):
        _, memory = step(small, memory, rollout(name, 1.0, "z"))
    assert list(memory["skills"]) == ["t", "v"]


def test_a_skill_that_is_written_again_counts_once_more() -> None:
    _, memory = step(store(), {}, rollout("t", 1.0, "same"), rollout("t", 0.0, "same", 1))
    assert memory["skills"]["t"]["skills"] == [{"text": "same", "mean": 0.5, "count": 2}]


@pytest.mark.parametrize(
    ("said", "skill"),
    [
        ('{"worked": "a", "wrong": "b", "workflow": "c"}', ["a", "b", "c"]),
        ('Sure:\n```json\n{"worked": "a {x}", "other": 3}\n```', ["a {x}"]),
        ('{"worked": ["no text"], "wrong": 3}', []),
        ('{"no": {"worked": "inside"}}', ["inside"]),
        ("{" * 5000, []),
        ("__import__('os')", []),
        ("", []),
    ],
)
def test_a_models_words_are_read_as_data(said: str, skill: list[str]) -> None:
    titles = ("What worked: ", "What went wrong: ", "Best workflow: ")
    assert read_skill(said) == "\n".join(t + s for t, s in zip(titles, skill))


def test_texts_are_cut() -> None:
    long = json.dumps({"worked": "word " * 1000, "wrong": "", "workflow": "x\n\n y"})
    first, last = read_skill(long).split("\n")
    assert len(first) == len("What worked: ") + LONGEST and last == "Best workflow: x y"


def test_rules_tell_the_first_and_the_last_thing_done() -> None:
    """By turns, the student's own tokens alone; by lines where there is one turn."""
    context = AnnotatorContext(TeacherContext(None, TOKENIZER), None)  # type: ignore[arg-type]
    rules = SkillSettings("rules").open(context)
    one, look, two = (TOKENIZER(t)["input_ids"] for t in ("go north", "You see a door.", "open it"))
    n, m = len(one) + len(look), len(one) + len(look) + len(two)
    tool = [len(one) <= t < n for t in range(m)]
    episode = Rollout(
        "0/t/0",
        [1],
        one + look + two,
        [not x for x in tool],
        [0.0] * m,
        [0.0] * m,
        "t",
        reward=0.0,
        correct=False,
        marks={"tool": tool},
        turns=[0] * n + [1] * len(two),
        feedback="The door is locked.",
        row={"prompt": "t"},
    )
    lines = rollout("u", 1.0, "first this\n\nthen that")
    _, memory = rules.annotate([episode, lines], AnnotateContext(0, 0))
    assert memory["skills"]["t"]["skills"][0]["text"] == (
        "What went wrong: 'open it' (The door is locked.)\n"
        "Best workflow: do otherwise than: begin with 'go north', end with 'open it'"
    )
    assert memory["skills"]["u"]["skills"][0]["text"] == (
        "What worked: then that\nBest workflow: begin with 'first this', end with 'then that'"
    )
