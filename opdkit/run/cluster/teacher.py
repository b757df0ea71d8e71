"""Teachers in processes of their own, which hold the models of a run in turn; the trainer asks for
hidden states, or for numbers where its method reads no more.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.models.device import device_of
from opdkit.models.layout import Layout, batch_tokens
from opdkit.models.limits import context_limit
from opdkit.models.load import load_tokenizer
from opdkit.models.tokenizers import usable
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.head import Head, Source
from opdkit.objective.supply import Tensors
from opdkit.run.cluster.actors import EVERY, Actor
from opdkit.run.open import Given, Models
from opdkit.run.resolve import on_device, with_models
from opdkit.run.settings import Run
from opdkit.teachers import LocalModel, Remote, Scorer, protocol
from opdkit.teachers.base import answers, source_of
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.pool import Gone, Pool, Worker
from opdkit.teachers.scored_facts import asked_by_parts

Numbers = dict[str, Tensor]


class TeacherActor:
    """One process that holds a teacher."""

    def __init__(self, run: Run):
        run = on_device(run, device_of(run.device).startswith("cuda"))
        method = run.method_spec.load()
        run = with_models(run, method)
        tokenizer = load_tokenizer(run.student, run.trust_remote_code)
        self.context = Models(run, method, device_of(run.device), Given(), tokenizer).context
        self.spec: Any = None
        self.local: LocalModel | None = None

    def alive(self) -> None:
        """That it can be asked."""

    def load(self, spec: Any) -> None:
        """Hold this teacher, and no other."""
        if spec != self.spec:
            self.spec = self.local = None  # first: there may be no room for two
            self.local, self.spec = spec.load(replace(self.context, opened={})), spec

    def about(self, spec: Any, whole: bool) -> About:
        """What the trainer has to know of a teacher."""
        self.load(spec)
        local = self.local
        assert local is not None
        return About(
            local.head.size(torch.zeros(0)),
            local.micro_batch_tokens or batch_tokens(next(local.model.parameters()).device),
            context_limit(local.model.config),
            protocol.head_on(local.head, torch.device("cpu")) if whole else None,
        )

    def score(self, spec: Any, body: bytes) -> Numbers:
        """The facts that a request asks for, [n] or [n, k], by their place in it; or hidden states
        [n, H], where it asks for none.
        """
        self.load(spec)
        local = self.local
        assert local is not None
        rows = local.head.size(torch.zeros(0))
        layout, positions, wanted, ids, vocab = protocol.unpack_request(body, rows)
        device = next(local.model.parameters()).device
        positions, local = positions.to(device), local.cut(vocab)
        if not wanted:
            source = local.source(layout, positions)
            return {"hidden": source.hidden[source.index[positions]].cpu()}
        theirs = {fact: values.to(device) for fact, values in ids.items()}
        made = answers(local, wanted, layout, positions, theirs)
        return {str(i): made[fact].cpu() for i, fact in enumerate(wanted)}


@dataclass(frozen=True)
class About:
    """What a process says of the teacher that it holds."""

    rows: int  # of its head
    micro_batch_tokens: int
    reads: int | None
    head: Head | None  # where the whole vocabulary is read


class Seat(Worker):
    """A place for a teacher in the pool: a process, and where there is one a spare that takes over
    when it dies, while it is started again and becomes the spare.
    """

    def __init__(self, actors: Sequence[Actor], specs: Mapping[str, Any]):
        self.actors, self.specs = list(actors), specs

    def load(self, name: str) -> None:
        self.actors[0]("load", self.specs[name])

    def call(self, name: str, request: Any) -> Any:
        method, *arguments = request
        return self.actors[0](method, self.specs[name], *arguments)

    def next(self, patience: float) -> Seat:
        """The same place after its process died, once it can be asked again."""
        first, *others = self.actors
        seat, end = Seat([*others, first], self.specs), time.monotonic() + patience
        while True:
            try:
                seat.actors[0]("alive")
                return seat
            except Gone:
                if time.monotonic() > end:
                    raise
                time.sleep(EVERY)


class Teachers:
    """The processes that hold a run's teachers, as one process of the trainers asks them.

    seats: of each place the process that works, and spares. patience: seconds to wait for one that
    is started again.
    """

    def __init__(self, seats: Sequence[Sequence[Actor]], patience: float):
        self.specs: dict[str, Any] = {}
        self.patience = patience
        self.seats = [Seat(actors, self.specs) for actors in seats]
        self.pool = Pool(self.seats, replacement=self._replaced)

    def _replaced(self, number: int) -> Worker:
        """Another process in the place of one that died."""
        self.seats[number] = self.seats[number].next(self.patience)
        return self.seats[number]

    def hosted(self, teacher: Any, context: TeacherContext) -> Scorer | Remote | None:
        """A teacher that is loaded there; None where it has to be in the trainer's process."""
        beyond = [
            fact
            for fact in context.method.needs.of(context.role)
            if fact.own_tokenizer or not (fact.whole_vocabulary or protocol.known(fact))
        ]
        if beyond or context.given is not None:
            return None
        name = context.role + context.member
        self.specs[name] = teacher
        whole = context.method.needs.whole(context.role)
        about: About = self.pool.submit(name, ("about", whole), 1).result()
        if whole:
            assert about.head is not None
            here = protocol.head_on(about.head, torch.device(context.device))
            return HostedStates(self, name, about, here)
        known = usable(context.tokenizer, about.rows)
        return HostedNumbers(self, name, about, known if about.rows > known else None)

    def ask(self, name: str, bodies: Sequence[bytes], tokens: Sequence[int]) -> list[Numbers]:
        """The answers to requests, in their order."""
        asked: list[Future[Any]] = [
            self.pool.submit(name, ("score", body), count) for body, count in zip(bodies, tokens)
        ]
        return [future.result() for future in asked]

    def counts(self) -> dict[str, float]:
        return self.pool.counts()

    def spans(self) -> list[Any]:
        return self.pool.spans()


@dataclass(frozen=True)
class _Hosted:
    """A teacher that other processes hold: a request per micro-batch, composed as in this process,
    so that the numbers are the same to the bit.
    """

    teachers: Teachers
    name: str
    about: About

    @property
    def reads(self) -> int | None:
        return self.about.reads

    def _parts(self, layout: Layout, positions: Tensor) -> list[Tensor]:
        """Flat positions [n] of each micro-batch, of all [N]."""
        return layout.micro_batches(positions.cpu(), self.about.micro_batch_tokens)

    def _ask(
        self,
        layout: Layout,
        parts: Sequence[Tensor],
        wanted: Collection[Fact],
        ids: Sequence[Mapping[TopFact, Tensor]],
        vocab: int | None,
    ) -> list[Numbers]:
        bodies = [
            protocol.pack_request(layout, part, wanted, at, vocab) for part, at in zip(parts, ids)
        ]
        return self.teachers.ask(self.name, bodies, [len(part) for part in parts])


@dataclass(frozen=True)
class HostedStates(_Hosted):
    """The whole vocabulary: hidden states from there, the head here."""

    head: Head

    @property
    def heads(self) -> list[Head]:
        return [self.head]

    def cut(self, vocab: int | None) -> HostedStates:
        """The same teacher, its head kept to the first rows."""
        return replace(self, head=replace(self.head, vocab=vocab))

    def source(self, layout: Layout, positions: Tensor) -> Source:
        """Hidden states at flat positions [N]."""
        parts = self._parts(layout, positions)
        found = self._ask(layout, parts, (), [{}] * len(parts), None)
        hidden = [answer["hidden"] for answer in found]
        return source_of(self.head.ready(), layout, parts, hidden, positions.device)


@dataclass(frozen=True)
class HostedNumbers(_Hosted):
    """The facts alone, found there."""

    vocab: int | None  # rows of the head to keep

    def cut(self, vocab: int | None) -> HostedNumbers:
        """The same teacher, its head kept to the first rows."""
        return self if vocab is None else replace(self, vocab=vocab)

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N]."""
        parts = self._parts(layout, positions)
        return asked_by_parts(
            wanted,
            positions,
            parts,
            ids,
            lambda at: self._ask(layout, parts, wanted, at, self.vocab),
        )
