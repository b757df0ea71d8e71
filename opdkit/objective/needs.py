"""What an objective reads, found by running it once on facts that are made up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.objective.alignment import AlignedSource, Alignment
from opdkit.objective.batch import Batch, Live
from opdkit.objective.facts import (
    ColumnFact,
    EntropyFact,
    Fact,
    GapFact,
    LogpAtFact,
    LogpFact,
    SpanFact,
    TopFact,
    VocabularyFact,
)
from opdkit.objective.grammar import Objective, RolloutLoss, Signal, TokenLoss, credit_of
from opdkit.objective.head import Head, Source
from opdkit.types import Watch


@dataclass(frozen=True)
class Needs:
    """What an objective reads, found by running it."""

    facts: frozenset[Fact]

    @property
    def models(self) -> frozenset[str]:
        """Every model it reads, among them "student" and "sampler"."""
        return frozenset(m for fact in self.facts for m in models_of(fact))

    @property
    def columns(self) -> frozenset[str]:
        """What it reads of the rollouts: reward, correct, group, mark:NAME, row:NAME."""
        return frozenset(fact.name for fact in self.facts if isinstance(fact, ColumnFact))

    def of(self, model: str) -> frozenset[Fact]:
        """Facts that involve a model."""
        return frozenset(fact for fact in self.facts if model in models_of(fact))

    def whole(self, model: str) -> bool:
        """Whether the whole vocabulary of a model is read: then it must run in this process."""
        return any(isinstance(fact, (VocabularyFact, GapFact, SpanFact)) for fact in self.of(model))

    def spans(self, model: str) -> bool:
        """Whether spans of text are read of a model: then it may have a tokenizer of its own, if
        `ids` is empty.
        """
        return any(isinstance(fact, SpanFact) for fact in self.of(model))

    def ids(self, model: str) -> frozenset[Fact]:
        """What is read of a model over the student's token ids: then it must have the student's
        tokenizer.
        """
        return frozenset(fact for fact in self.of(model) if not isinstance(fact, SpanFact))

    def __str__(self) -> str:
        return ", ".join(sorted(set(map(describe, self.facts)))) or "nothing"


def models_of(fact: Fact) -> tuple[str, ...]:
    """The models a fact speaks of."""
    if isinstance(fact, ColumnFact):
        return ()
    if isinstance(fact, GapFact):
        return (fact.student, fact.teacher)
    if isinstance(fact, LogpAtFact):
        return (fact.model, fact.owner)
    return (fact.model,)


def watched(needs: Needs) -> Watch:
    """What a sampler notes of the student so that no pass of it is needed; nothing where one is
    needed anyway.
    """
    own = [
        f
        for f in needs.of("student")
        if isinstance(f, TopFact) or (isinstance(f, LogpAtFact) and f.owner == "student")
    ]
    tokens = {LogpFact("student"), EntropyFact("student")}
    if needs.of("student") - set(own) - tokens:
        return Watch()
    return Watch(
        bool({EntropyFact("student"), EntropyFact("live")} & needs.facts),
        max((f.k for f in own), default=0),
    )


def describe(fact: Fact) -> str:
    """A fact in words."""
    if isinstance(fact, LogpFact):
        return f"{fact.model} log-prob of the sampled token"
    if isinstance(fact, EntropyFact):
        return f"{fact.model} entropy"
    if isinstance(fact, TopFact):
        return f"{fact.model} top-{fact.k} ids"
    if isinstance(fact, LogpAtFact):
        return f"{fact.model} log-probs at the {fact.owner}'s top {fact.k}"
    if isinstance(fact, GapFact):
        return f"{fact.kind} of {fact.student} and {fact.teacher} over the whole vocabulary"
    if isinstance(fact, VocabularyFact):
        return f"{fact.model} over the whole vocabulary"
    if isinstance(fact, SpanFact):
        what = {
            "tokens": f"spans of text that the {fact.model}'s tokens cover too",
            "logp": f"{fact.model} log-probs of those spans",
            "single": "which spans are one token on both sides, of the student and the "
            f"{fact.model}",
            "vocabulary": f"{fact.model} over the whole vocabulary of its own tokenizer",
            "shared": f"whether the {fact.model} has the student's tokenizer",
        }
        return what[fact.what]
    return fact.name


class _Probe(Batch):
    """A tiny batch that makes up every fact it is asked for and notes it."""

    ROWS, LENGTH, VOCABULARY = 2, 3, 8

    def __init__(self) -> None:
        shape = (self.ROWS, self.LENGTH)
        super().__init__(torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool))
        self.asked: set[Fact] = set()

    def read(self, fact: Fact) -> Tensor:
        self.asked.add(fact)
        shape = torch.Size((self.ROWS, self.LENGTH))
        if isinstance(fact, TopFact):
            return torch.arange(min(fact.k, self.VOCABULARY)).expand(*shape, -1)
        if isinstance(fact, LogpAtFact):
            return torch.full((*shape, min(fact.k, self.VOCABULARY)), -3.0)
        if isinstance(fact, ColumnFact):
            if fact.name == "group":
                return torch.zeros(self.ROWS, dtype=torch.int64)
            values = torch.arange(self.ROWS, dtype=self.dtype)
            return values > 0 if fact.name == "correct" else values
        if isinstance(fact, SpanFact) and fact.what != "logp":
            kind = torch.int64 if fact.what == "tokens" else torch.bool
            return torch.ones(self.ROWS, 1 if fact.what == "shared" else self.LENGTH, dtype=kind)
        return torch.full(shape, 1.0 if isinstance(fact, (EntropyFact, GapFact)) else -1.0)

    def mark(self, name: str) -> Tensor:
        self.asked.add(ColumnFact(f"mark:{name}"))
        return torch.zeros_like(self.mask)

    def source(self, model: str, fact: Fact | None = None) -> AlignedSource:
        self.asked.add(fact or VocabularyFact(model))
        cells, ends = self.tokens.numel(), torch.arange(self.LENGTH).expand(self.ROWS, -1)
        own = Alignment(self.tokens, ends, ends, torch.arange(self.VOCABULARY), shared=True)
        return AlignedSource(
            Source(torch.zeros(cells, self.VOCABULARY), torch.arange(cells), Head()), own
        )


def per_rollout(signal: Signal) -> bool:
    """Whether a signal is one number per rollout or step, not one per token: found by running it on
    made-up facts.
    """
    return signal(_Probe()).shape[1] == 1


def needs(objective: Objective) -> Needs:
    """What an objective reads: the formula is run once on made-up facts that note each reading.

    Every loss is run whatever its weight, so that what is read only at rare tokens is found as
    well.
    """
    probe = _Probe()
    positions = torch.arange(probe.tokens.numel())
    live = Live(probe, positions, torch.zeros(len(positions), probe.VOCABULARY))
    for part in objective.plan(probe).parts:
        if isinstance(part.term.loss, TokenLoss):
            part.term.loss.value(live)
        elif isinstance(part.term.loss, RolloutLoss):
            rows = torch.arange(probe.ROWS)
            part.term.loss.value(live.logp.view(probe.shape), probe.mask, rows, probe)
        credit = credit_of(part.term.loss)
        if credit is not None:
            credit(probe)
    return Needs(frozenset(probe.asked))
