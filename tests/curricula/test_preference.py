"""Pairs of the data as rollouts: what they are worth is known, and no reward changes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from opdkit.curricula import Preference, curriculum_of, writer_of
from opdkit.methods.method import load
from opdkit.objective.facts import ColumnFact
from opdkit.objective.needs import Needs
from opdkit.rewards import score
from opdkit.train.gather import _columns, collate
from opdkit.types import Prompt, Rollout, Sampling
from tests.curricula.context import context

PROMPTS = (Prompt("a", [5, 6], {"id": "a"}), Prompt("b", [7], {"id": "b"}))


def pair(prompt: Prompt) -> Any:
    return ([8, 9, 2], f"{prompt.id} yes"), ([4, 2], f"{prompt.id} no")


def written(online: int = 0, **changes: Any) -> list[Rollout]:
    return Preference(online).writer.write(context(PROMPTS, pair=pair, **changes))


def test_both_responses_of_a_row_are_given_and_judged() -> None:
    rollouts = written(step=3)
    assert [r.id for r in rollouts] == [
        "3/a/chosen", "3/a/rejected", "3/b/chosen", "3/b/rejected",
    ]  # fmt: skip
    assert [r.correct for r in rollouts] == [True, False] * 2
    assert [r.reward for r in rollouts] == [1.0, 0.0] * 2
    assert [r.text for r in rollouts] == ["a yes", "a no", "b yes", "b no"]
    assert [r.tokens for r in rollouts] == [[8, 9, 2], [4, 2]] * 2
    assert [r.group for r in rollouts] == ["a", "a", "b", "b"]
    for r in rollouts:
        assert r.finish == "given" and r.marks == {"given": [True] * len(r.tokens)}
        assert all(r.trained) and r.logp == []


def test_they_are_cut_at_the_runs_limit_and_asked_once() -> None:
    short = written(sampling=Sampling(max_completion_length=1))
    assert [r.tokens for r in short] == [[8], [4]] * 2
    twice = Preference().writer.write(context((*PROMPTS, PROMPTS[0]), pair=pair))
    assert len(twice) == 4


def test_of_two_that_are_the_same_once_cut_neither_is_preferred() -> None:
    """Their gradients cancel but for rounding, which AdamW would make as large as any other."""

    def alike(prompt: Prompt) -> Any:
        return ([8, 9, 2], "yes"), ([8, 9, 4] if prompt.id == "a" else [8, 3], "no")

    rollouts = Preference(1).writer.write(
        context(PROMPTS, pair=alike, sampling=Sampling(max_completion_length=2))
    )
    assert [r.tokens for r in rollouts[:4]] == [[8, 9], [8, 9], [8, 9], [8, 3]]
    assert [r.correct for r in rollouts[:4]] == [False, False, True, False]
    assert [r.reward for r in rollouts[:4]] == [0.0, 0.0, 1.0, 0.0]
    assert all(all(r.trained) for r in rollouts)  # another loss may learn from their text
    told = Preference(1).metrics(rollouts, 0, 1, {})
    assert told == {"alike": 0.5} and Preference().metrics(written(), 0, 1, {}) == {"alike": 0.0}


def test_a_reward_leaves_them_as_they_are_and_scores_the_others() -> None:
    """Whatever it says, and in their order; those of the data that nobody judged are scored."""
    own = Rollout("0/a/0", [5], [1], [True], [-1.0], [-1.0], "a")
    unjudged = replace(written()[0], reward=None, correct=None)
    mixed = [written()[1], own, unjudged, written()[0]]
    scored = score(mixed, lambda r: 0.25)
    assert [r.reward for r in scored] == [0.0, 0.25, 0.25, 1.0]
    assert [r.correct for r in scored] == [False, True, True, True]
    assert [r.id for r in scored] == [r.id for r in mixed]


def test_the_students_own_stand_beside_them_marked() -> None:
    rollouts = written(online=2)
    pairs, own = rollouts[:4], rollouts[4:]
    assert [r.id for r in own] == ["a/0", "a/1", "b/0", "b/1"]
    assert all(r.marks == {"online": [True]} for r in own) and pairs == written()
    assert [r.group for r in own] == ["a", "a", "b", "b"]  # learnt from in the same optimiser step
    more = written(online=2, sampling=Sampling(num_generations=3))
    assert len(more) == 4 + 6
    with pytest.raises(ValueError, match="online=-1 must be at least 0"):
        Preference(-1)


def test_what_is_known_of_a_step_in_which_some_are_judged() -> None:
    """Which of the pair is right is known, and nothing of the student's own; rewards are not."""
    rollouts = written(online=1)
    batch = collate(rollouts, "cpu", torch.float32)
    _columns(batch, rollouts, Needs(frozenset()))
    assert batch.correct.tolist() == [True, False] * 2 + [False] * 2
    assert ColumnFact("reward") not in batch.facts
    pairs = written()
    batch = collate(pairs, "cpu", torch.float32)
    _columns(batch, pairs, Needs(frozenset()))
    assert batch.reward.tolist() == [1.0, 0.0] * 2


def test_what_it_says_of_itself() -> None:
    alone, beside = writer_of(Preference()), writer_of(Preference(2))
    assert alone.judged == {"reward", "correct"} and beside.judged == {"correct"}
    assert not alone.draws and beside.draws and alone.reads_pairs and not alone.reads_data
    assert curriculum_of({"kind": "preference", "online": 2}) == Preference(2)
    assert load("f_dpo").objective.terms[0].whose == ("student", "data")
