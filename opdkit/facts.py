"""Facts from models in this process: which numbers an objective reads, and how a chunked pass over a source supplies them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit import kernels
from opdkit.align import AlignedSource, Alignment
from opdkit.head import Head, Source, slices
from opdkit.head import chunk_rows as default_rows
from opdkit.objective import Objective, RolloutLoss, Signal, TokenLoss, credit_of
from opdkit.types import (
    Batch,
    ColumnFact,
    EntropyFact,
    Fact,
    GapFact,
    Live,
    LogpAtFact,
    LogpFact,
    SpanFact,
    TopFact,
    VocabularyFact,
    Watch,
)

Tensors = dict[Fact, Tensor]


# ----------------------------------------------------------------------------------------------------------------- needs


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
        """Whether spans of text are read of a model: then it may have a tokenizer of its own, if `ids` is empty."""
        return any(isinstance(fact, SpanFact) for fact in self.of(model))

    def ids(self, model: str) -> frozenset[Fact]:
        """What is read of a model over the student's token ids: then it must have the student's tokenizer."""
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
    """What a sampler notes of the student so that no pass of it is needed; nothing where one is needed anyway."""
    own = [f for f in needs.of("student") if isinstance(f, TopFact) or (isinstance(f, LogpAtFact) and f.owner == "student")]
    tokens = {LogpFact("student"), EntropyFact("student")}
    if needs.of("student") - set(own) - tokens:
        return Watch()
    return Watch(bool({EntropyFact("student"), EntropyFact("live")} & needs.facts), max((f.k for f in own), default=0))


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
            "single": f"which spans are one token on both sides, of the student and the {fact.model}",
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
        return AlignedSource(Source(torch.zeros(cells, self.VOCABULARY), torch.arange(cells), Head()), own)


def per_rollout(signal: Signal) -> bool:
    """Whether a signal is one number per rollout or step, not one per token: found by running it on made-up facts."""
    return signal(_Probe()).shape[1] == 1


def needs(objective: Objective) -> Needs:
    """What an objective reads: the formula is run once on made-up facts that note each reading.

    Every loss is run whatever its weight, so that what is read only at rare tokens is found as well.
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


# --------------------------------------------------------------------------------------------------------------- supply


def supply(batch: Batch, wanted: Collection[Fact], positions: Tensor, chunk: int | None = None) -> Tensors:
    """The wanted facts whose models are in `batch.sources`, at flat positions [N], scattered to [B, T] or [B, T, k].

    One pass: a chunk's logits of each model are made once and everything is read off them. Elsewhere the facts are zero.
    Facts of which the batch already holds the tensor (a server's top-k, the sampler's log-probs) are left alone.
    """
    sources = batch.sources
    wanted = set(wanted) | {TopFact(f.owner, f.k) for f in wanted if isinstance(f, LogpAtFact)}
    todo = [f for f in wanted if not isinstance(f, (ColumnFact, VocabularyFact)) and f not in batch.facts]
    todo = [f for f in todo if all(m in sources or _held(batch, f, m) for m in models_of(f))]
    spans = [f for f in todo if isinstance(f, SpanFact)]
    aligned: Tensors = {f: sources[f.model].read(f, batch.mask) for f in spans if f.what != "vocabulary"}
    todo = sorted(
        (f for f in todo if f not in spans), key=lambda f: (not isinstance(f, TopFact), describe(f))
    )  # ids before log-probs there
    if not todo:
        return aligned
    used = {m for f in todo for m in models_of(f) if m in sources}
    size = chunk or default_rows(max(sources[m].vocabulary for m in used), batch.device)
    parts: dict[Fact, list[Tensor]] = {f: [] for f in todo}
    with torch.no_grad():
        for at in list(slices(len(positions), size)) or [slice(0, 0)]:
            here = Live(batch, positions[at], torch.empty(0))
            made: Tensors = {}
            for fact in todo:
                made[fact] = _read(fact, here, made)
                parts[fact].append(made[fact])
    return aligned | {f: _scatter(batch, positions, parts[f]) for f in todo}


def _held(batch: Batch, fact: Fact, model: str) -> bool:
    """Whether the ids at which another model is to be read have been supplied from elsewhere."""
    return isinstance(fact, LogpAtFact) and model == fact.owner != fact.model and TopFact(model, fact.k) in batch.facts


def _read(fact: Fact, here: Live, made: Tensors) -> Tensor:
    """One fact at one chunk of positions."""
    if isinstance(fact, LogpFact):
        return here.vocabulary(fact.model).at(here.tokens[:, None])[:, 0]
    if isinstance(fact, EntropyFact):
        return here.vocabulary(fact.model).statistics()[1]
    if isinstance(fact, TopFact):
        logits = here.vocabulary(fact.model).logits
        return logits.topk(min(fact.k, logits.shape[-1]), -1).indices
    if isinstance(fact, LogpAtFact):
        ids = made[TopFact(fact.owner, fact.k)] if TopFact(fact.owner, fact.k) in made else here.read(TopFact(fact.owner, fact.k))
        return here.vocabulary(fact.model).at(ids)
    if isinstance(fact, GapFact):
        student, teacher = here.vocabulary(fact.student), here.vocabulary(fact.teacher)
        return kernels.divergence(fact.kind, student, teacher, fact.temperature)  # type: ignore[arg-type]
    raise TypeError(f"{fact} is not read off a vocabulary")


def _scatter(batch: Batch, positions: Tensor, parts: list[Tensor]) -> Tensor:
    values = torch.cat(parts)
    full = torch.zeros((batch.tokens.numel(), *values.shape[1:]), dtype=values.dtype, device=values.device)
    full[positions] = values
    return full.view(*batch.shape, *values.shape[1:])
