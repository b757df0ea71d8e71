"""Replay: when the share of student text rises, who writes each batch, and what is stored."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from opdkit.base.errors import UserError
from opdkit.curricula.replay import Replay
from opdkit.types import Rollout


def rollout(name: str, **changes) -> Rollout:
    plain = Rollout(
        name,
        [1, 2],
        [3, 4],
        [True, True],
        [-0.5, -0.1],
        [-0.5, -0.1],
        "p",
        marks={"guided": [True, False]},
        row={"a": 1},
    )
    return replace(plain, **changes)


FULL = {"phi": 0.2, "store": [{}] * 1000}


def test_share_rises_with_the_loss_since_it_last_rose():
    replay, memory = Replay(), {}
    seen = []
    for loss in (1.0, 0.9, 1.12, 1.20, 1.23):  # the first is before training
        memory = replay.validated(loss, memory)
        seen.append((round(memory["phi"], 9), memory["level"]))
    assert seen == [(0.0, 1.0), (0.0, 1.0), (0.1, 1.12), (0.1, 1.12), (0.2, 1.23)]


def test_share_stays_at_one():
    memory = {"phi": 0.95, "level": 1.0}
    assert Replay().validated(5.0, memory)["phi"] == 1.0


@pytest.mark.parametrize(
    ("schedule", "q"), [("decreasing", 0.15), ("constant", 0.1), ("increasing", 0.05)]
)
def test_fresh_share(schedule, q):
    assert Replay(schedule).fresh(0.2, 500, 2000) == pytest.approx(q, abs=1e-12)


def test_choice():
    choose = lambda u, memory=FULL: Replay().choose(u, 500, 2000, memory)  # noqa: E731
    assert [choose(0.12), choose(0.18), choose(0.5)] == ["student", "replay", "data"]
    assert choose(0.18, {"phi": 0.2, "store": [{}] * 999}) == "student"  # not full yet
    assert choose(0.2, {"phi": 0.2}) == "data"


def test_without_a_share_all_is_data():
    assert {Replay().source(step, 100, 0, {}) for step in range(100)} == {"data"}


def test_threshold_is_the_share_before_anything_is_validated():
    assert Replay(threshold=1.0).source(0, 100, 0, {}) == "student"


def test_shares_over_many_steps():
    """phi 0.6, constant: 0.3 written anew, 0.3 replayed, 0.4 from the data; deviation of 4000 draws
    0.008.
    """
    memory = {"phi": 0.6, "store": [{}] * 10}
    replay = Replay("constant", capacity=10)
    seen = [replay.source(step, 1, 3, memory) for step in range(4000)]
    for source, share in (("student", 0.3), ("replay", 0.3), ("data", 0.4)):
        assert seen.count(source) / len(seen) == pytest.approx(share, abs=0.03)
    assert seen == [replay.source(step, 1, 3, memory) for step in range(4000)]
    assert seen != [replay.source(step, 1, 4, memory) for step in range(4000)]


def test_store_keeps_the_last_that_the_student_wrote():
    replay, memory = Replay(capacity=3), {"phi": 0.1}
    memory = replay.observe([rollout("a"), rollout("b"), rollout("given", finish="given")], memory)
    memory = replay.observe([rollout("b")], memory)  # replayed: it is there already
    assert [row["id"] for row in memory["store"]] == ["a", "b"] and memory["phi"] == 0.1
    memory = replay.observe([rollout("c"), rollout("d")], memory)
    assert [row["id"] for row in memory["store"]] == ["b", "c", "d"]


def test_replayed_responses_are_different_whole_and_survive_a_checkpoint():
    replay = Replay(capacity=8)
    memory = json.loads(json.dumps(replay.observe([rollout(str(i)) for i in range(8)], {})))
    drawn = replay.replay(5, 7, 0, memory)
    assert len({r.id for r in drawn}) == 5 and drawn[0] == rollout(drawn[0].id)
    assert drawn == replay.replay(5, 7, 0, memory)
    assert {r.id for step in range(20) for r in replay.replay(5, step, 0, memory)} == set(
        "01234567"
    )


def test_a_store_smaller_than_a_batch_is_explained():
    with pytest.raises(UserError, match="set capacity"):
        Replay(capacity=2).replay(3, 0, 0, {"store": [{}] * 2})
