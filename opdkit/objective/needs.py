"""What an objective reads, found by running it once on facts that are made up."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from opdkit.objective.alignment import AlignedSource, Alignment
from opdkit.objective.batch import Batch, Live
from opdkit.objective.companion import Around, Companion, Companions
from opdkit.objective.facts import ColumnFact, Fact, LogpFact, VocabularyFact
from opdkit.objective.formula import Signal, factors
from opdkit.objective.grammar import Objective, RolloutLoss, TokenLoss, credit_of
from opdkit.objective.head import Head, Source
from opdkit.types import AUTHORS, Watch

INTERNAL = frozenset({"student", "sampler", "live"})  # models that are the run itself


@dataclass(frozen=True)
class Needs:
    """What an objective reads, found by running it, of tokens that `authors` wrote."""

    facts: frozenset[Fact]
    authors: tuple[str, ...] = ("student",)
    companions: frozenset[Companion] = frozenset()
    hidden: bool = False  # whether a loss reads the student's own hidden states
    # what weights and losses compute from them, each after what it is made of
    signals: tuple[Signal, ...] = field(default=(), compare=False)

    @property
    def models(self) -> frozenset[str]:
        """Every model it reads, among them "student" and "sampler"."""
        return frozenset(m for fact in self.facts for m in fact.models)

    @property
    def columns(self) -> frozenset[str]:
        """What it reads of the rollouts: reward, correct, group, mark:NAME, row:NAME."""
        return frozenset(f.words() for f in self.facts if f.read_from == "rollouts")

    def of(self, model: str) -> frozenset[Fact]:
        """Facts that involve a model."""
        return frozenset(fact for fact in self.facts if model in fact.models)

    def kept(self, model: str) -> bool:
        """Whether a loss reads a model chunk by chunk, whose hidden states are kept for it."""
        return any(fact.read_from == "loss" for fact in self.of(model))

    def whole(self, model: str) -> bool:
        """Whether the whole vocabulary of a model is read: then it must run in this process."""
        return any(fact.whole_vocabulary for fact in self.of(model))

    def spans(self, model: str) -> bool:
        """Whether spans of text are read of a model: then it may have a tokenizer of its own, if
        `ids` is empty.
        """
        return any(fact.own_tokenizer for fact in self.of(model))

    def ids(self, model: str) -> frozenset[Fact]:
        """What is read of a model over the student's token ids: then it must have the student's
        tokenizer.
        """
        return frozenset(fact for fact in self.of(model) if not fact.own_tokenizer)

    def __str__(self) -> str:
        words = {fact.words() for fact in self.facts}
        words |= {"hidden states of the live student"} if self.hidden else set()
        return ", ".join(sorted(words)) or "nothing"


def reads_student(needs: Needs) -> bool:
    """Whether a pass of the student before the step is needed: more is read of it than its sampler
    notes.
    """
    return any(
        fact.watch(model) is None for model in ("student", "live") for fact in needs.of(model)
    )


def watched(needs: Needs) -> Watch:
    """What a sampler notes of the student so that no pass of it is needed; nothing where one is
    needed anyway.
    """
    if reads_student(needs):
        return Watch()
    noted = [fact.watch("student") for fact in needs.of("student")]
    # before the first optimiser step the live student is the one that wrote
    noted += [fact.watch("live") for fact in needs.of("live")]
    return Watch(
        any(w.entropy for w in noted if w is not None),
        max((w.top for w in noted if w is not None), default=0),
    )


class _Probe(Batch):
    """A tiny batch that makes up every fact it is asked for and notes it."""

    ROWS, LENGTH, VOCABULARY = 2, 3, 8
    # a formula may read more from some step on, or until some share of the run
    STEPS = (0, 1, 10, 100, 1_000, 10_000, 100_000, 999_999)

    def __init__(self, step: int = 0) -> None:
        shape = (self.ROWS, self.LENGTH)
        super().__init__(
            torch.zeros(shape, dtype=torch.int64),
            torch.ones(shape, dtype=torch.bool),
            step=step,
            total_steps=self.STEPS[-1] + 1,
        )
        self.asked: set[Fact] = set()
        self.hidden_asked = False
        self.timed = False  # whether it was asked what step it is

    @property
    def step(self) -> int:
        self.timed = True
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step

    def read(self, fact: Fact) -> Tensor:
        """[ROWS, LENGTH] or [ROWS, LENGTH, k]; a column [ROWS]."""
        self.asked.add(fact)
        for companion in fact.companions:
            self.companion(companion)
        made = fact.made_up(self.ROWS, self.LENGTH, self.VOCABULARY)
        return made.to(self.dtype) if made.is_floating_point() else made

    def mark(self, name: str) -> Tensor:
        """[ROWS, LENGTH] bool."""
        return self.read(ColumnFact(f"mark:{name}"))

    def companion(self, companion: Companion) -> Any:
        if companion not in self.companions:
            around = Around(lambda model: self.VOCABULARY, self.device, self.dtype)
            made = Companions.build([companion], around)
            self.companions = Companions({**self.companions, **made})
        return self.companions[companion]

    def hidden(self) -> Tensor:
        """[ROWS * LENGTH, VOCABULARY]: the live student's hidden states."""
        self.hidden_asked = True
        return self.logits(self.tokens.numel())

    def logits(self, count: int) -> Tensor:
        """[count, VOCABULARY], whatever numbers torch makes by default."""
        return torch.zeros(count, self.VOCABULARY, dtype=self.dtype)

    def source(self, model: str, fact: Fact | None = None) -> AlignedSource:
        self.asked.add(fact or VocabularyFact(model))
        cells, ends = self.tokens.numel(), torch.arange(self.LENGTH).expand(self.ROWS, -1)
        own = Alignment(self.tokens, ends, ends, torch.arange(self.VOCABULARY), shared=True)
        return AlignedSource(Source(self.logits(cells), torch.arange(cells), Head()), own)


def per_rollout(signal: Signal) -> bool:
    """Whether a signal is one number per rollout or step, not one per token: found by running it on
    made-up facts.
    """
    return signal(_Probe()).shape[1] == 1


def idle(objective: Objective, step: int, total_steps: int) -> frozenset[int]:
    """The terms, by number, that weigh nothing at a step whatever its rollouts are: a factor of
    theirs reads nothing of these and is zero, such as a schedule that has ended.
    """

    def off(factor: Signal) -> bool:
        probe = _Probe(step)  # one of its own, so that all that the factor reads is noted
        probe.total_steps = total_steps
        value = factor(probe)
        return not probe.asked and value.shape == (1, 1) and not bool(value)

    return frozenset(
        number
        for number, term in enumerate(objective.terms)
        if any(off(factor) for factor in factors(term.weights))
    )


@lru_cache(maxsize=256)  # a formula is a value, and is asked again and again
def needs(objective: Objective, idle: frozenset[int] = frozenset()) -> Needs:
    """What an objective reads: the formula is run on made-up facts that note each reading; at a few
    steps from the first to the last, if it asks what step it is.

    Every loss is run whatever its weight, so that what is read only at rare tokens is found as
    well; but those of `idle` terms, by number, which select nothing.
    """
    probes: list[_Probe] = []
    for step in _Probe.STEPS:
        probes.append(_Probe(step))
        _run(objective, probes[-1], idle)
        if not probes[-1].timed:  # it would read the same at any other step
            break
    # signals look at the student's tokens, whoever wrote those that a loss is about
    wrote = {"student", *(author for term in objective.terms for author in term.whose)}
    return Needs(
        frozenset(fact for probe in probes for fact in probe.asked),
        tuple(a for a in AUTHORS if a in wrote),
        frozenset(companion for probe in probes for companion in probe.companions),
        any(probe.hidden_asked for probe in probes),
        tuple(dict.fromkeys(signal for probe in probes for signal in probe.signals)),
    )


def _run(objective: Objective, probe: _Probe, idle: frozenset[int]) -> None:
    """What it is to learn from a batch, up to the gradient."""
    positions = torch.arange(probe.tokens.numel())
    for number, planned in enumerate(objective.plan(probe).parts):
        loss = planned.term.loss
        if number in idle:
            continue
        if isinstance(loss, TokenLoss):
            # one of its own: what another term has read is not read again
            logits = probe.logits(len(positions))
            loss.value(Live(probe, positions, logits, hidden=probe.hidden))
        elif isinstance(loss, RolloutLoss):
            rows = torch.arange(probe.ROWS)
            loss.value(probe.read(LogpFact("live")), probe.mask, rows, probe)
        credit = credit_of(loss)
        if credit is not None:
            credit(probe)
