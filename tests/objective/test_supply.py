"""Facts: what each objective is found to read, and that one chunked pass over the sources supplies
exactly that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from opdkit.methods.method import load
from opdkit.objective.batch import Batch
from opdkit.objective.divergences import ReverseKL
from opdkit.objective.facts import (
    ColumnFact,
    EntropyFact,
    GapFact,
    LogpAtFact,
    LogpFact,
    MissingFact,
    TopFact,
    VocabularyFact,
)
from opdkit.objective.formula import Signal
from opdkit.objective.grammar import Objective
from opdkit.objective.head import Head, Source, flat_positions
from opdkit.objective.losses import Divergence, Likelihood, PolicyGradient
from opdkit.objective.needs import Needs, needs
from opdkit.objective.signals import Entropy, Gap, LogRatio, Mark, Reward, Row
from opdkit.objective.supply import supply
from opdkit.testing import fabricate
from opdkit.types import row_keys
from tests.common.toy import naive_fact

STUDENT, SAMPLER, TEACHER, REFERENCE = map(LogpFact, ("student", "sampler", "teacher", "reference"))
GROUP, CORRECT, GUIDED = map(ColumnFact, ("group", "correct", "mark:guided"))
GAP = GapFact(ReverseKL(), "student", "teacher")


def top(owner, k):
    """What a divergence over the top k of `owner` reads of the teacher."""
    return {TopFact(owner, k), LogpAtFact("teacher", owner, k)}


@pytest.mark.parametrize(
    ("name", "arguments", "facts"),
    [
        ("opd", {}, {STUDENT, SAMPLER, TEACHER}),
        ("opd", {"support": "full"}, {VocabularyFact("teacher")}),
        ("opd", {"support": "teacher", "k": 4}, top("teacher", 4)),
        ("opd", {"support": "student", "k": 4}, top("student", 4)),
        ("opd", {"support": "union", "k": 4}, top("teacher", 4) | top("student", 4)),
        ("gkd", {}, {VocabularyFact("teacher")}),
        ("gopd", {}, {STUDENT, SAMPLER, TEACHER}),
        ("exopd", {}, {STUDENT, SAMPLER, TEACHER, REFERENCE}),
        ("tropd", {}, {STUDENT, SAMPLER, TEACHER, GUIDED} | top("teacher", 64)),
        ("tropd", {"outliers": "mask"}, {STUDENT, SAMPLER, TEACHER, GUIDED}),
        ("iw_opd", {}, {STUDENT, SAMPLER, TEACHER}),
        ("position_opd", {}, {STUDENT, SAMPLER, TEACHER}),
        ("scope", {}, {STUDENT, SAMPLER, TEACHER, CORRECT, GROUP}),
        ("vopd", {}, {STUDENT, SAMPLER, TEACHER, GAP}),
        (
            "vopd",
            {"k": 5},
            {STUDENT, SAMPLER, TEACHER, LogpAtFact("student", "student", 5)} | top("student", 5),
        ),
    ],
)
def test_needs_are_found_by_running_the_formula(name, arguments, facts):
    assert load(name, **arguments).needs.facts == facts


def test_what_is_read_only_at_rare_tokens_is_found():
    never = Divergence("reverse_kl", k=3, teacher="judge") * (LogRatio("teacher", "student") > 1e9)
    assert {TopFact("student", 3), LogpAtFact("judge", "student", 3)} <= needs(
        Objective(never)
    ).facts


@dataclass(frozen=True)
class Own(Signal):
    """A user's signal: nothing is declared."""

    def value(self, batch):
        return batch["judge"].entropy * batch.column("level")[:, None] + batch["judge"].at_top(
            "teacher", 2
        ).sum(-1)


def test_needs_of_a_users_signal():
    found = needs(Objective(Likelihood() * Own()))
    assert found.facts == {
        EntropyFact("judge"),
        ColumnFact("row:level"),
        LogpAtFact("judge", "teacher", 2),
    }
    assert found.models == {"judge", "teacher"} and found.columns == {"row:level"}


def test_needs_in_words():
    found = load("scope").needs
    assert (
        found.columns == {"correct", "group"}
        and found.of("teacher") == {TEACHER}
        and not found.whole("teacher")
    )
    assert load("gkd").needs.whole("teacher") and load("vopd").needs.whole("student")
    assert str(
        load("opd").needs
    ) == "sampler log-prob of the sampled token, student log-prob of the sampled token, " + (
        "teacher log-prob of the sampled token"
    )
    assert str(
        Needs(frozenset())
    ) == "nothing" and "teacher log-probs at the student's top 5" in str(load("vopd", k=5).needs)


# ------------------------------------------------------------------------------------------- supply

ALL = {
    *(LogpFact(m) for m in ("student", "teacher", "reference")),
    EntropyFact("teacher"),
    *(TopFact(m, 3) for m in ("student", "teacher")),
    LogpAtFact("teacher", "student", 3),
    LogpAtFact("student", "student", 3),
    LogpAtFact("reference", "teacher", 3),
    GAP,
    GapFact(ReverseKL(), "teacher", "reference"),
}


def setting(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    cells, mask = torch.arange(12), torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    sources = {}
    for width, name in ((5, "student"), (7, "teacher"), (6, "reference")):
        hidden, weight = (
            torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
            for s in ((12, width), (9, width))
        )
        sources[name] = Source(hidden, cells, Head(weight, vocab=8))
    batch = Batch(torch.randint(8, (3, 4), generator=g), mask, sources=sources, dtype=dtype)
    logps = {
        name: source.logits(cells).log_softmax(-1).view(3, 4, 8) for name, source in sources.items()
    }
    return batch, logps


@pytest.mark.parametrize("chunk", [1, 3, 8, 1000, None])
def test_supplied_facts_are_the_naive_ones(chunk):
    batch, logps = setting()
    made = supply(batch, ALL, flat_positions(batch.mask), chunk)
    assert made.keys() == ALL
    for fact, value in made.items():
        naive = naive_fact(fact, logps, batch.tokens)
        assert torch.allclose(
            value[batch.mask].double(), naive[batch.mask].double(), rtol=0, atol=1e-12
        ), fact
        assert (value[~batch.mask] == 0).all() and not value.requires_grad


def test_ids_are_supplied_where_only_log_probs_at_them_are_asked_for():
    batch, _ = setting()
    made = supply(batch, {LogpAtFact("teacher", "student", 2)}, flat_positions(batch.mask))
    assert made.keys() == {LogpAtFact("teacher", "student", 2), TopFact("student", 2)}


def test_nothing_is_projected_twice_and_nothing_that_is_not_asked_for():
    batch, _ = setting()
    calls: list[str] = []

    @dataclass(frozen=True)
    class Watched(Head):
        label: str = ""

        def product(self, hidden):
            calls.extend([self.label] * len(hidden))
            return super().product(hidden)

    for name, s in batch.sources.items():
        batch.sources[name] = Source(s.hidden, s.index, Watched(s.head.weight, vocab=8, label=name))
    wanted = {
        LogpFact("teacher"),
        EntropyFact("teacher"),
        TopFact("teacher", 3),
        LogpAtFact("student", "teacher", 3),
    }
    supply(batch, wanted, flat_positions(batch.mask), 3)
    assert {name: calls.count(name) for name in batch.sources} == {
        "student": 8,
        "teacher": 8,
        "reference": 0,
    }


def test_facts_that_are_there_are_left_alone_and_a_servers_ids_are_used():
    batch, logps = setting()
    ids = torch.tensor([5, 1]).expand(3, 4, 2)
    del batch.sources["teacher"]  # a server: it sent its top two and their log-probs
    batch.facts = {
        TopFact("teacher", 2): ids,
        LogpAtFact("teacher", "teacher", 2): torch.full((3, 4, 2), -0.9).double(),
    }
    batch.facts[LogpFact("student")] = torch.full((3, 4), -7.0).double()
    wanted = {*batch.facts, LogpAtFact("student", "teacher", 2), LogpFact("teacher")}
    made = supply(batch, wanted, flat_positions(batch.mask))
    assert made.keys() == {LogpAtFact("student", "teacher", 2)}
    at = made[LogpAtFact("student", "teacher", 2)]
    assert torch.allclose(
        at[batch.mask], logps["student"].gather(-1, ids)[batch.mask], rtol=0, atol=1e-12
    )


def test_nothing_trained_supplies_empty_facts():
    batch, _ = setting()
    made = supply(batch, ALL, torch.zeros(0, dtype=torch.int64))
    assert made.keys() == ALL and all(
        (v == 0).all() and v.shape[:2] == (3, 4) for v in made.values()
    )


def test_an_infinite_logit_makes_no_nan():
    batch, _ = setting()
    source = Source(torch.tensor([[0.3, 0.1, -math.inf]] * 12).double(), torch.arange(12), Head())
    batch.sources = {"teacher": source, "student": source}
    batch.tokens = torch.zeros_like(batch.tokens)
    made = supply(batch, {EntropyFact("teacher"), GAP}, flat_positions(batch.mask))
    two = torch.tensor([0.3, 0.1]).double().softmax(0)
    assert made[EntropyFact("teacher")][0, 0].item() == pytest.approx(
        -(two * two.log()).sum().item()
    )
    assert (made[GAP] == 0).all()


# -------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        (LogRatio("teacher", "student"), "give the run that model"),
        (Entropy("judge"), "no scores of judge"),
        (Reward(), "pass reward="),
        (Row("level"), "no such column"),
        (Gap("reverse_kl", "student", 9), "the objective reads student top-9 ids"),
    ],
)
def test_a_missing_fact_says_how_to_supply_it(signal, words):
    batch = Batch(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(MissingFact, match=words):
        signal(batch)


def test_a_model_that_cannot_supply_a_fact_is_told_apart_from_one_that_is_absent():
    batch, _ = setting()
    batch.facts = {LogpFact("server"): torch.zeros(3, 4)}
    with pytest.raises(MissingFact, match="cannot supply"):
        Entropy("server")(batch)
    with pytest.raises(MissingFact, match="no scores of server2"):
        Entropy("server2")(batch)


def test_an_objective_is_not_run_on_facts_it_did_not_get():
    objective = Objective(PolicyGradient(LogRatio("teacher", "student")) * Mark("guided"))
    case = fabricate(objective)
    with pytest.raises(MissingFact, match="teacher"):
        type(case)(**{**vars(case), "models": {}}).run(objective)


def test_row_keys_are_fixed_and_distinct():
    ids = [f"{step}/{i}" for step in range(20) for i in range(50)]
    keys = row_keys(ids)
    assert len(set(keys.tolist())) == 1000 and torch.equal(row_keys(ids[::-1]), keys.flip(0))
    # a change would change every random signal of a resumed run
    assert row_keys(["0/0/0"]).tolist() == [-8829620128957328363]
