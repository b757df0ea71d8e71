"""A cached teacher answers as the model that was stored, for the rollouts that were stored, and
says what it cannot.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.data.cache import open_cache
from opdkit.methods.method import load
from opdkit.models.identity import tokenizer_digest
from opdkit.models.layout import Layout
from opdkit.objective.facts import EntropyFact, LogpAtFact, LogpFact, TopFact
from opdkit.objective.needs import Needs
from opdkit.teachers.cached import CachedScorer, CachedTeacher
from opdkit.teachers.context import TeacherContext
from opdkit.train.gather import gather
from opdkit.types import Rollout
from tests.common.tiny import tiny_tokenizer
from tests.data.test_cache import ORIGIN, prompt, stored, write

LOGP, TOP, AT = LogpFact("teacher"), TopFact("teacher", 2), LogpAtFact("teacher", "teacher", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    origin = replace(ORIGIN, tokenizer=tokenizer_digest(tiny_tokenizer()))
    return write(tmp_path_factory.mktemp("cached") / "cache", stored(0), origin)


@pytest.fixture(scope="module")
def rollouts(folder: Path) -> list[Rollout]:
    cache = open_cache(folder)
    return [r for made, _ in stored(0)[::2] for r in cache.rollouts(prompt(made))]


def test_numbers_stand_at_the_positions_that_ask_for_them(
    folder: Path, rollouts: list[Rollout]
) -> None:
    chosen = [rollouts[i] for i in (7, 0, 4)]
    layout = Layout(chosen, max(len(r.tokens) for r in chosen))
    # in any order
    positions = torch.tensor([2 * layout.width, 0, len(chosen[0].tokens) - 1, 2 * layout.width + 1])
    told = CachedScorer(open_cache(folder)).facts([LOGP, TOP, AT], layout, positions, {})
    scores = [{r.id: s for r, s in stored(0)}[r.id] for r in chosen]
    where = [(2, 0), (0, 0), (0, len(chosen[0].tokens) - 1), (2, 1)]
    assert told[LOGP].tolist() == [scores[b].logp.astype("f2").item(t) for b, t in where]
    assert told[TOP].tolist() == [scores[b].top_ids[t, :2].tolist() for b, t in where]
    assert told[AT].tolist() == [scores[b].top_logp.astype("f2")[t, :2].tolist() for b, t in where]
    nowhere = CachedScorer(open_cache(folder)).facts([LOGP], layout, positions[:0], {})
    assert nowhere[LOGP].shape == (0,)


def test_it_takes_its_place_among_a_steps_facts_whatever_the_order_of_rollouts(
    folder: Path, rollouts: list[Rollout]
) -> None:
    scorers = {"teacher": CachedScorer(open_cache(folder))}
    needs = Needs(frozenset({LOGP, TOP, AT}))
    batch = gather(rollouts, needs, scorers)
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = gather([rollouts[i] for i in order], needs, scorers)
    for fact in (LOGP, TOP, AT):
        assert torch.equal(batch.read(fact)[order], shuffled.read(fact))
    alone = gather(rollouts[3:4], needs, scorers)  # a part of a batch, as on one rank of several
    assert torch.equal(alone.read(AT)[0], batch.read(AT)[3, : alone.shape[1]])
    assert (batch.read(LOGP)[~batch.mask] == 0).all()


def test_stored_log_probs_of_the_writer_never_stand_for_the_students(
    folder: Path, rollouts: list[Rollout]
) -> None:
    """They are rounded, and the student has moved: its own are asked for even at the first step."""
    with pytest.raises(KeyError, match="student"):
        gather(
            rollouts,
            Needs(frozenset({LOGP, LogpFact("student")})),
            {"teacher": CachedScorer(open_cache(folder))},
        )
    batch = gather(rollouts, Needs(frozenset({LogpFact("sampler")})), {})
    assert batch.read(LogpFact("sampler"))[0, 0] == rollouts[0].logp[0]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "opd",
            r"method 'opd' trains on responses written at each step .*use lightning_opd, "
            r".*rollouts=cache, or use a live teacher",
        ),
        (
            "lightning_opd + opd(support='teacher', k=5)",
            r"reads the teacher's top 5, .* holds the teacher's top 3: .*--top-k 5.*use k=3",
        ),
        (
            "lightning_opd + opd(support='student', k=2)",
            "teacher log-probs at the student's top 2, which a cached teacher cannot say",
        ),
        ("lightning_opd + gkd", r"which a cached teacher cannot say.*teacher in this process"),
    ],
)
def test_what_it_cannot_say_is_refused_with_a_way_out(
    folder: Path, method: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        CachedTeacher(str(folder)).open(TeacherContext(load(method), tiny_tokenizer()))


def test_another_tokenizer_and_other_facts_are_refused(
    folder: Path, rollouts: list[Rollout]
) -> None:
    with pytest.raises(UserError, match="tokenizer is not that of"):
        CachedTeacher(str(folder)).open(
            TeacherContext(load("lightning_opd"), tiny_tokenizer(["abc abd"]))
        )
    teacher = CachedTeacher(str(folder)).open(
        TeacherContext(load("lightning_opd"), tiny_tokenizer())
    )
    with pytest.raises(UserError, match="teacher entropy, which a cached teacher cannot say"):
        teacher.facts([EntropyFact("teacher")], Layout(rollouts, 40), torch.tensor([0]), {})
    with pytest.raises(UserError, match="has other tokens than the one that the teacher scored"):
        other = replace(rollouts[0], tokens=[t + 1 for t in rollouts[0].tokens])
        gather([other], Needs(frozenset({LOGP})), {"teacher": teacher})
