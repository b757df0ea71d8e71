"""What a step leaves of episodes: who wrote what, and how far the student is from its teacher in
each turn.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdkit.objective import LogRatio, PolicyGradient, Term
from opdkit.objective.facts import LogpFact
from opdkit.report.dialogue import parts
from opdkit.train.gather import collate
from opdkit.train.record import Recorder, StepRecord, parts_of, rollout_metrics
from opdkit.train.track import Trackers
from opdkit.types import MARK_OF, Rollout


def episode(name: str, *written: tuple[int, str, int], **changes: Any) -> Rollout:
    """A rollout of parts (turn, author, tokens); the tokens are counted."""
    authors = [author for _, author, n in written for _ in range(n)]
    n = len(authors)
    made = Rollout(
        f"0/{name}/0",
        [1, 2],
        list(range(10, 10 + n)),
        [author == "student" for author in authors],
        [-1.0 if author == "student" else 0.0 for author in authors],
        [-1.0] * n,
        name,
        marks={mark: [a == author for a in authors] for author, mark in MARK_OF.items()},
        turns=[turn for turn, _, n in written for _ in range(n)],
        row={"prompt": "of the row"},
    )
    return replace(made, **changes)


TWO_TURNS = ((0, "student", 2), (0, "environment", 3), (1, "student", 1))
REPLAYED = ((0, "data", 2), (0, "environment", 1), (1, "student", 2), (1, "environment", 1))


@pytest.mark.parametrize("written", [TWO_TURNS, REPLAYED, ((0, "guide", 1), (0, "student", 4))])
def test_parts_are_who_wrote_and_in_which_turn(written: tuple[tuple[int, str, int], ...]) -> None:
    rollout = episode("a", *written)
    assert parts_of(rollout) == list(written)
    shown = parts(parts_of(rollout), len(rollout.tokens))
    assert [(p.turn, p.author, p.end - p.start) for p in shown] == list(written)


def test_an_answer_without_turns_is_one_part() -> None:
    plain = Rollout("0/a/0", [1], [2, 3], [True] * 2, [-1.0] * 2, [-1.0] * 2, "a")
    assert parts_of(plain) == [(0, "student", 2)]
    assert parts_of(replace(plain, tokens=[], trained=[], logp=[], drawn_logp=[])) == []
    assert not any(name.startswith("turns/") for name in rollout_metrics([plain]))


def test_turns_per_episode() -> None:
    longer = episode("b", *TWO_TURNS, (1, "environment", 1), (2, "student", 1), (3, "student", 1))
    told = rollout_metrics([episode("a", *TWO_TURNS), longer])
    assert [told[f"turns/{end}"] for end in ("mean", "min", "max")] == [3.0, 2.0, 4.0]


def recorded(rollouts: list[Rollout], teacher: list[list[float]] | None) -> dict[str, float]:
    """Metrics of a step in which the student gives every token -1 and the teacher these."""
    batch = collate(rollouts, "cpu", torch.float64)
    if teacher is not None:
        batch.facts[LogpFact("student")] = torch.full(batch.shape, -1.0, dtype=torch.float64)
        batch.facts[LogpFact("teacher")] = torch.tensor(teacher, dtype=torch.float64)
    plan = SimpleNamespace(parts=(), mask=batch.mask, batch=batch)
    record = StepRecord(())
    record.close(plan, torch.zeros(()), 1e-3)  # type: ignore[arg-type]
    record.curriculum = {"length": 128.0}
    return record.metrics(batch)


def test_kl_by_turn_counts_the_tokens_that_the_student_drew() -> None:
    """Turn 1: gaps 1 and 3 of the first, none of the second, whose turn an expert wrote. Turn 2:
    gap 2 of the first, 0 and 7 of the second. The environment's tokens would be 99.
    """
    rollouts = [episode("a", *TWO_TURNS), episode("b", *REPLAYED)]
    env = -100.0
    teacher = [[-2.0, -4.0, env, env, env, -3.0], [env, env, env, -1.0, -8.0, env]]
    told = recorded(rollouts, teacher)
    assert {name: value for name, value in told.items() if "by_turn" in name} == {
        "tokens_by_turn/01": 2,
        "kl_by_turn/01": 2.0,
        "tokens_by_turn/02": 3,
        "kl_by_turn/02": 3.0,
    }
    assert told["teacher_kl/sampled"] == pytest.approx(2.6) and told["curriculum/length"] == 128.0


def test_without_a_teacher_turns_are_counted_and_without_turns_nothing_is() -> None:
    told = recorded([episode("a", *TWO_TURNS)], None)
    assert (told["tokens_by_turn/01"], told["tokens_by_turn/02"]) == (2, 1)
    assert not any(name.startswith("kl_by_turn") for name in told)
    plain = episode("a", *TWO_TURNS, turns=[])
    assert not any("by_turn" in name for name in recorded([plain], None))


def test_a_sample_keeps_what_the_report_shows_of_an_episode(tmp_path: Path) -> None:
    rollout = episode("a", *TWO_TURNS, feedback="Try the other door.", correct=False, reward=0.5)
    batch = collate([rollout], "cpu", torch.float64)
    for model, logp in (("student", -1.0), ("teacher", -1.5)):
        batch.facts[LogpFact(model)] = torch.full(batch.shape, logp, dtype=torch.float64)
    term = Term(PolicyGradient(LogRatio("teacher", "student")))
    plan = SimpleNamespace(parts=[SimpleNamespace(term=term, weight=batch.mask.double())])
    recorder = Recorder(tmp_path, Trackers([]), lambda token: f"<{token}>")
    recorder.samples(1, [rollout], batch, plan)  # type: ignore[arg-type]
    line = json.loads((tmp_path / "samples" / "step_000001.jsonl").read_text())
    assert line["parts"] == [list(part) for part in TWO_TURNS]
    assert line["prompt"] == "<1><2>"  # what the student read: the row does not say it all
    assert (line["feedback"], line["correct"], line["reward"]) == (
        "Try the other door.",
        False,
        0.5,
    )
    # what is not trained has no credit, whatever the formula says there
    assert line["credit"] == [-0.5, -0.5, None, None, None, -0.5]
    one = replace(rollout, turns=[])
    recorder.samples(2, [one], batch, plan)  # type: ignore[arg-type]
    line = json.loads((tmp_path / "samples" / "step_000002.jsonl").read_text())
    assert line["prompt"] == "of the row"
