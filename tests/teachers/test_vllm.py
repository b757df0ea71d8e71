"""The teacher in a vLLM engine: what it is asked for and where its answers go; the engine is played
by transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.methods.method import load
from opdkit.models.body import head_of
from opdkit.models.engines.prompt_logprobs import PromptScores
from opdkit.models.engines.vllm_engine import EngineSettings
from opdkit.models.layout import Layout
from opdkit.objective.facts import EntropyFact, Fact, LogpAtFact, LogpFact, TopFact
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel
from opdkit.teachers.base import Remote, answers
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.vllm import VllmScorer, VllmTeacher, deepest
from tests.common.rounding import FORWARD
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.train.rows import rollouts

OWN: list[Fact] = [
    LogpFact("teacher"),
    TopFact("teacher", 5),
    LogpAtFact("teacher", "teacher", 5),
    TopFact("teacher", 2),
]


class Played:
    """The engine's part of a teacher."""

    limit = 64

    def __init__(self, model: Any):
        self.model, self.calls = model, []  # type: ignore[var-annotated]

    def wake(self) -> None:
        self.calls.append("wake")

    def sleep(self) -> None:
        self.calls.append("sleep")

    def score(
        self, sequences: Sequence[list[int]], starts: Sequence[int], who: Sequence[str], k: int
    ) -> list[PromptScores]:
        self.calls.append((k, list(who)))
        out = []
        for ids, start in zip(sequences, starts):
            with torch.no_grad():
                logps = self.model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            top = logps.topk(k)
            out.append(
                PromptScores(
                    logps.gather(1, torch.tensor(ids[start:])[:, None])[:, 0],
                    top.indices,
                    top.values,
                )
            )
        return out


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(seed=4)


def teacher(model: Any, k: int = 5) -> VllmScorer:
    made: Any = object.__new__(VllmScorer)
    made.model, made.k, made.tokens, made.engine, made.settings = (
        "M",
        k,
        320,
        Played(model),
        EngineSettings(),
    )
    return made


def test_answers_are_those_of_the_model_in_this_process(model: Any) -> None:
    """At chosen positions in any order, gaps among them, one rollout without any."""
    rows = rollouts()
    layout = Layout(rows, 8)
    chosen = [0, 2, 4, 9, 16 + 7, 16 + 1, 16 + 3, 32]  # b * 8 + t
    positions = torch.tensor(chosen)[torch.tensor([3, 0, 7, 5, 1, 4, 2, 6])]
    made = teacher(model)
    ours = made.facts(OWN, layout, positions, {})
    theirs = answers(LocalModel(model, head_of(model)), OWN, layout, positions, {})
    assert isinstance(made, Remote) and ours.keys() == set(OWN)
    for fact in OWN:
        torch.testing.assert_close(ours[fact], theirs[fact], atol=FORWARD, rtol=0)
    asked = [f"rollout 0/{b}/0 at M" for b in (0, 1, 2, 4)]
    assert made.engine.calls == ["wake", (5, asked), "sleep"]  # type: ignore[attr-defined]


def test_only_what_is_wanted_is_asked_for(model: Any) -> None:
    made = teacher(model)
    made.facts([LogpFact("teacher")], Layout(rollouts(), 8), torch.tensor([0]), {})
    assert made.engine.calls[1][0] == 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="started for 5 log-probs per token, and 9"):
        made.facts([TopFact("teacher", 9)], Layout(rollouts(), 8), torch.tensor([0]), {})


def test_no_position(model: Any) -> None:
    made = teacher(model).facts(OWN, Layout(rollouts(), 8), torch.zeros(0, dtype=torch.int64), {})
    assert [tuple(made[f].shape) for f in OWN] == [(0,), (0, 5), (0, 5), (0, 2)] and made[
        OWN[1]
    ].dtype == torch.int64


def test_a_rollout_longer_than_its_context(model: Any) -> None:
    made = teacher(model)
    made.engine.limit = 8
    with pytest.raises(
        UserError,
        match=r"rollout 0/2/0 at M: 9 tokens .* raise teacher.max_model_len to at least 10",
    ):
        made.facts(OWN, Layout(rollouts(), 8), torch.tensor([16 + 7]), {})


def test_how_deep_a_method_reads() -> None:
    facts: list[Fact] = [
        LogpFact("teacher"),
        TopFact("student", 99),
        LogpAtFact("teacher", "teacher", 7),
        LogpAtFact("student", "teacher", 9),
    ]
    assert deepest(Needs(frozenset(facts)), "teacher") == 9
    assert deepest(Needs(frozenset({LogpFact("teacher")})), "teacher") == 0


def test_what_it_cannot_say_is_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    folder, tokenizer = save_tiny(tmp_path / "m"), tiny_tokenizer()
    teacher = VllmTeacher(model=folder)
    for fact in (EntropyFact("teacher"), LogpAtFact("teacher", "student", 4)):
        method: Any = SimpleNamespace(name="mine", needs=Needs(frozenset({fact})))
        with pytest.raises(UserError, match=r"'mine' reads .* cannot say"):
            teacher.open(TeacherContext(method, tokenizer))
    with pytest.raises(UserError, match=r"tokenizer of .* is not the student's"):
        teacher.open(TeacherContext(load("opd"), tiny_tokenizer(["other texts"], 300)))
    context = TeacherContext(load("opd"), tokenizer)
    with pytest.raises(UserError, match="weights that nobody sends again"):
        replace(teacher, enable_sleep_mode=True, sleep_level=2).open(context)
    with pytest.raises(UserError, match="vLLM cannot be imported"):
        teacher.open(context)
