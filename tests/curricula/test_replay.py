"""Replay: when the share of student text rises, who writes each batch, and what is stored."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from opdkit.base.errors import UserError
from opdkit.curricula.data import DataWriter
from opdkit.curricula.replay import Replay, ReplayWriter
from opdkit.curricula.store import StoreWriter
from opdkit.curricula.student import StudentWriter
from opdkit.curricula.writer import Writer
from opdkit.types import Prompt, Rollout, Sampling
from tests.curricula.context import context


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
        memory = replay.validated({"loss": loss}, memory)
        seen.append((round(memory["phi"], 9), memory["level"]))
    assert seen == [(0.0, 1.0), (0.0, 1.0), (0.1, 1.12), (0.1, 1.12), (0.2, 1.23)]


def test_share_stays_at_one():
    memory = {"phi": 0.95, "level": 1.0}
    assert Replay().validated({"loss": 5.0}, memory)["phi"] == 1.0


@pytest.mark.parametrize(
    ("schedule", "q"), [("decreasing", 0.15), ("constant", 0.1), ("increasing", 0.05)]
)
def test_fresh_share(schedule, q):
    assert ReplayWriter(schedule, 0.0, 1000).fresh(0.2, 500, 2000) == pytest.approx(q, abs=1e-12)


def written_by(replay: Replay, step: int, total_steps: int, seed: int, memory: dict) -> Writer:
    asked = context(step=step, total_steps=total_steps, seed=seed, memory=memory)
    return replay.writer.choose(asked.coin, step, total_steps, memory)


def test_choice():
    writer = Replay().writer
    assert [writer.choose(u, 500, 2000, FULL) for u in (0.12, 0.18, 0.5)] == [
        StudentWriter(),
        StoreWriter(1000),
        DataWriter(),
    ]
    not_full = {"phi": 0.2, "store": [{}] * 999}
    assert writer.choose(0.18, 500, 2000, not_full) == StudentWriter()
    assert writer.choose(0.2, 500, 2000, {"phi": 0.2}) == DataWriter()


def test_without_a_share_all_is_data():
    assert {written_by(Replay(), step, 100, 0, {}) for step in range(100)} == {DataWriter()}


def test_threshold_is_the_share_before_anything_is_validated():
    assert written_by(Replay(threshold=1.0), 0, 100, 0, {}) == StudentWriter()


def test_shares_over_many_steps():
    """phi 0.6, constant: 0.3 written anew, 0.3 replayed, 0.4 from the data; deviation of 4000 draws
    0.008.
    """
    memory = {"phi": 0.6, "store": [{}] * 10}
    replay = Replay("constant", capacity=10)
    seen = [written_by(replay, step, 1, 3, memory) for step in range(4000)]
    for writer, share in ((StudentWriter(), 0.3), (StoreWriter(10), 0.3), (DataWriter(), 0.4)):
        assert seen.count(writer) / len(seen) == pytest.approx(share, abs=0.03)
    assert seen == [written_by(replay, step, 1, 3, memory) for step in range(4000)]
    assert seen != [written_by(replay, step, 1, 4, memory) for step in range(4000)]


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
    five = [Prompt(str(i), [1]) for i in range(5)]

    def drawn(step: int) -> list[Rollout]:
        return StoreWriter(8).write(context(five, step=step, memory=memory))

    again = drawn(7)
    assert len({r.id for r in again}) == 5 and again[0] == rollout(again[0].id)
    assert again == drawn(7)
    assert {r.id for step in range(20) for r in drawn(step)} == set("01234567")


def test_a_store_smaller_than_a_batch_is_explained():
    asked = context([Prompt("q", [1])], sampling=Sampling(num_generations=3))
    with pytest.raises(UserError, match=r"3 responses .* set capacity \(now 2\)"):
        StoreWriter(2).write(replace(asked, memory={"store": [{}] * 2}))
