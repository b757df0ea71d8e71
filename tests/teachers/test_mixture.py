"""A mixture is the weighted mean of distributions; several teachers by route and teachers elsewhere
give the same facts as local ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit import UserError
from opdkit.base.clock import Clock
from opdkit.models.body import head_of
from opdkit.models.layout import Layout
from opdkit.objective.facts import EntropyFact, Fact, LogpAtFact, LogpFact, TopFact
from opdkit.objective.head import flat_positions
from opdkit.objective.needs import Needs
from opdkit.objective.supply import Tensors
from opdkit.teachers import LocalModel, MixtureScorer, RoutedRemote
from opdkit.teachers.base import answers
from opdkit.train.gather import collate, gather
from tests.common.tiny import tiny_model
from tests.train.rows import naive_logps, rollouts

FACTS: list[Fact] = [
    LogpFact("teacher"),
    EntropyFact("teacher"),
    LogpAtFact("teacher", "teacher", 3),
    LogpAtFact("student", "teacher", 3),
    LogpAtFact("teacher", "student", 2),
    LogpFact("student"),
]


@dataclass(frozen=True)
class Elsewhere:
    """A teacher that answers with numbers, as a server does; notes what it is asked."""

    model: LocalModel
    asked: list[tuple[set[Fact], set[TopFact]]]

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        self.asked.append((set(wanted), set(ids)))
        return answers(self.model, wanted, layout, positions, ids)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        name: tiny_model(kind, seed=seed).double()
        for name, kind, seed in (("student", "qwen3", 1), ("a", "llama", 2), ("b", "qwen3", 3))
    }


def local(model: Any) -> LocalModel:
    return LocalModel(model, head_of(model))


def facts(
    models: dict[str, Any], teacher: Any, rows: Any, wanted: Collection[Fact] = tuple(FACTS)
) -> Any:
    scorers = {"student": local(models["student"]), "teacher": teacher}
    return gather(
        rows, Needs(frozenset(wanted)), scorers, recompute_student=True, dtype=torch.float64
    )


@pytest.mark.parametrize("weights", [None, {"a": 3.0, "b": 1.0}, "blend"], ids=str)
def test_a_mixture_is_the_mean_of_its_distributions(models: dict[str, Any], weights: Any) -> None:
    blends = [{"a": 0.2, "b": 0.8}, {"a": 1}, {"b": 5.0}, {"a": 1, "b": 3}, {"a": 2, "b": 2}]
    rows = [replace(r, row={"blend": blend}) for r, blend in zip(rollouts(), blends)]
    mixed = MixtureScorer({"a": local(models["a"]), "b": local(models["b"])}, weights)
    batch = facts(models, mixed, rows, [LogpFact("teacher"), EntropyFact("teacher")])
    shares = {None: [0.5] * 5, "blend": [0.2, 1.0, 0.0, 0.25, 0.5]}.get(
        weights if isinstance(weights, str) else None, [0.5] * 5
    )
    if isinstance(weights, dict):
        shares = [0.75] * 5
    for b, (row, share) in enumerate(zip(rows, shares)):
        probs = (
            share * naive_logps(models["a"], row).exp()
            + (1 - share) * naive_logps(models["b"], row).exp()
        )
        chosen = torch.tensor(row.tokens, dtype=torch.int64)[:, None]
        n = len(row.tokens)
        torch.testing.assert_close(
            batch["teacher"].logp[b, :n], probs.log().gather(-1, chosen)[:, 0], rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            batch["teacher"].entropy[b, :n], -(probs * probs.log()).sum(-1), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(
    ("blend", "said"),
    [
        (None, "not a mapping"),
        ({"c": 1.0}, "names 'c'"),
        ({"a": 0.0, "b": 0.0}, "one must be positive"),
        ({"a": -1.0, "b": 2.0}, "none may be negative"),
    ],
)
def test_bad_weights_name_the_rollout(models: dict[str, Any], blend: Any, said: str) -> None:
    rows = [replace(r, row={"blend": blend}) for r in rollouts()]
    with pytest.raises(UserError, match=said) as error:
        facts(
            models,
            MixtureScorer({"a": local(models["a"]), "b": local(models["b"])}, "blend"),
            rows,
            [LogpFact("teacher")],
        )
    assert rows[0].id in str(error.value)


def test_a_teacher_elsewhere_gives_the_facts_of_one_here(models: dict[str, Any]) -> None:
    asked: list[Any] = []
    here, there = (
        facts(models, t, rollouts())
        for t in (local(models["a"]), Elsewhere(local(models["a"]), asked))
    )
    for fact in FACTS:
        torch.testing.assert_close(there.read(fact), here.read(fact), rtol=0, atol=0)
    first, second = asked  # twice, as it is read at ids that the student names
    assert first[0] == {
        LogpFact("teacher"),
        EntropyFact("teacher"),
        TopFact("teacher", 3),
        LogpAtFact("teacher", "teacher", 3),
    }
    assert second[0] == {LogpAtFact("teacher", "student", 2)} and TopFact("student", 2) in second[1]


def test_the_time_in_which_a_teacher_elsewhere_is_asked_is_no_work_of_the_trainer(
    models: dict[str, Any],
) -> None:
    """Each time that it is asked, and none where the teacher is in this process."""

    class Server(Elsewhere):
        elsewhere = True

    asked: list[Any] = []
    for teacher, times in ((Server(local(models["a"]), asked), 2), (local(models["a"]), 0)):
        clock = Clock()
        scorers = {"student": local(models["student"]), "teacher": teacher}
        with clock("score"):
            gather(rollouts(), Needs(frozenset(FACTS)), scorers, clock=clock)
        [(_, begun, ended)] = clock.spans
        assert len(clock.waits) == times
        assert all(begun <= a <= b <= ended for _, a, b in clock.waits)


def test_a_teacher_elsewhere_is_asked_once_for_its_own_numbers(models: dict[str, Any]) -> None:
    asked: list[Any] = []
    facts(
        models,
        Elsewhere(local(models["a"]), asked),
        rollouts(),
        [LogpFact("teacher"), LogpAtFact("student", "teacher", 3)],
    )
    assert [wanted for wanted, _ in asked] == [{LogpFact("teacher"), TopFact("teacher", 3)}]


def test_routes_may_mix_teachers_here_and_elsewhere(models: dict[str, Any]) -> None:
    names = "abbab"
    rows = [replace(r, row={"teacher": name}) for r, name in zip(rollouts(), names)]
    routed = facts(
        models,
        RoutedRemote({"a": Elsewhere(local(models["a"]), []), "b": local(models["b"])}),
        rows,
    )
    alone = {name: facts(models, local(models[name]), rows) for name in "ab"}
    for fact in FACTS:
        for b, name in enumerate(names):
            torch.testing.assert_close(
                routed.read(fact)[b], alone[name].read(fact)[b], rtol=0, atol=1e-12
            )


def test_a_mixture_has_every_teachers_head_cut_alike(models: dict[str, Any]) -> None:
    mixed = MixtureScorer({"a": local(models["a"]), "b": local(models["b"])}).cut(300)
    rows = rollouts()
    layout, positions = Layout(rows, 8), flat_positions(collate(rows, "cpu", torch.float64).mask)
    logps = mixed.source(layout, positions).logits(positions)
    assert logps.shape[1] == 300
    torch.testing.assert_close(
        logps.logsumexp(-1), torch.zeros(len(positions), dtype=torch.float64), rtol=0, atol=1e-12
    )
