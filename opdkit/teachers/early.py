"""Teachers behind servers whose answers about a rollout may have come before the step asks: what
was begun as it ended is taken from here where it is the very same request, and else asked now.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from opdkit.models.layout import Layout
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.head import Head
from opdkit.objective.supply import Tensors
from opdkit.teachers.base import in_order, source_of
from opdkit.types import Rollout

BEGUN = "answers that were begun"  # among what a run has opened
MOST = 8 << 30  # bytes of answers that wait at once; beyond, rollouts are asked about in their step

T = TypeVar("T")
Values = dict[Any, Tensor]  # of one rollout: [n] or [n, k] by fact, or [n, H] as "hidden"


@dataclass(frozen=True)
class Answer:
    """One of a teacher's about a rollout, for a step; an error in its place is that step's."""

    step: int
    rollout: str
    values: Values | Exception

    @property
    def size(self) -> int:
        """Bytes."""
        if isinstance(self.values, Exception):
            return 0
        return sum(v.numel() * v.element_size() for v in self.values.values())


# that requests are begun for; in the threads that do it and those they ask others in
_step: ContextVar[int | None] = ContextVar("step", default=None)


class Begun:
    """Answers that came before they were asked for, of all teachers of a run.

    They are found by what a server is told of a rollout: the tokens that the teacher reads, and the
    positions. So one that was changed since (by a filter, an annotator, a view) is asked about
    anew.
    """

    def __init__(self) -> None:
        self.threads = 0  # requests that the servers take at once, all together
        self.size = 0  # bytes of all answers
        self._answers: dict[bytes, Answer] = {}
        self._under_way: dict[str, threading.Event] = {}  # by the rollout's id
        self._lock = threading.Lock()
        self.used = 0  # answers

    @property
    def beginning(self) -> bool:
        """Whether requests are begun here, and not asked by a step."""
        return _step.get() is not None

    def expect(self, rollout: str) -> None:
        """Requests about a rollout are going to be begun."""
        with self._lock:
            self._under_way[rollout] = threading.Event()

    @contextmanager
    def begins(self, rollout: str, step: int) -> Iterator[None]:
        """What is asked inside is kept for a step."""
        before = _step.set(step)
        try:
            yield
        finally:
            _step.reset(before)
            with self._lock:
                self._under_way.pop(rollout).set()

    def wait(self, rollouts: Iterable[str]) -> None:
        """Until what is under way about these has ended, well or not."""
        for rollout in rollouts:
            with self._lock:
                event = self._under_way.get(rollout)
            if event is not None:
                event.wait()

    def put(self, key: bytes, rollout: str, values: Values | Exception) -> None:
        step = _step.get()
        assert step is not None
        self.give({key: Answer(step, rollout, values)})

    def take(self, key: bytes, wanted: Collection[Any]) -> Values | None:
        """An answer that holds all that is wanted, which is kept no longer."""
        with self._lock:
            found = self._answers.get(key)
            if found is None:
                return None
            if isinstance(found.values, dict) and not set(wanted) <= set(found.values):
                return None
            self._forget([key])
            self.used += 1
        if isinstance(found.values, Exception):
            raise found.values
        return found.values

    def discard(self, before: int) -> int:
        """Forgets what is for steps before this one; returns how many answers that were."""
        with self._lock:
            return len(self._forget(k for k, a in self._answers.items() if a.step < before))

    def about(self, rollouts: Collection[str]) -> dict[bytes, Answer]:
        """The answers about these, once they are there; they are no longer here."""
        self.wait(rollouts)
        with self._lock:
            return self._forget(k for k, a in self._answers.items() if a.rollout in rollouts)

    def give(self, answers: Mapping[bytes, Answer]) -> None:
        """In the place of what there was about the same."""
        with self._lock:
            self._forget(answers.keys() & self._answers.keys())
            self._answers |= answers
            self.size += sum(answer.size for answer in answers.values())

    def _forget(self, keys: Iterable[bytes]) -> dict[bytes, Answer]:
        """Under the lock."""
        gone = {key: self._answers.pop(key) for key in list(keys)}
        self.size -= sum(answer.size for answer in gone.values())
        return gone


@dataclass
class _Early:
    """A client of servers, with the answers that were begun."""

    elsewhere: ClassVar[bool] = True
    inner: Any
    begun: Begun
    name: str  # of this teacher among those of the run

    def early(self, rollout: Rollout) -> bool:
        """Whether requests about a rollout can be begun as it ends: these read its tokens alone."""
        return True

    def _asked(self, each: Sequence[tuple[Rollout, Tensor, bytes]], ask: Callable[[], T]) -> T:
        """What is begun; where that fails, the step that reads it fails so."""
        try:
            return ask()
        except Exception as error:
            for rollout, _, key in each:
                self.begun.put(key, rollout.id, error)
            raise

    def _each(self, layout: Layout, positions: Tensor) -> list[tuple[Rollout, Tensor, bytes]]:
        """Of each rollout that has some of the flat positions [N]: the places [n] of its own among
        these, and the key of the request about them.
        """
        where = positions.cpu()
        rows, found = where // layout.width, []
        for b in rows.unique().tolist():
            index = (rows == b).nonzero()[:, 0]
            rollout = layout.rollouts[b]
            told = [rollout.prompt, rollout.tokens, (where[index] % layout.width).tolist()]
            key = hashlib.blake2b(f"{self.name} {told}".encode(), digest_size=16).digest()
            found.append((rollout, index, key))
        return found

    def _found(
        self, each: Sequence[tuple[Rollout, Tensor, bytes]], wanted: Collection[Any]
    ) -> list[Values | None]:
        self.begun.wait(rollout.id for rollout, _, _ in each)
        return [self.begun.take(key, wanted) for _, _, key in each]


@dataclass
class EarlyNumbers(_Early):
    """Numbers of servers (`client_vllm_sglang.Served`, `client_serve.Numbers`)."""

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N]."""
        if ids or not len(positions):
            made: Tensors = self.inner.facts(wanted, layout, positions, ids)
            return made
        each = self._each(layout, positions)
        if self.begun.beginning:
            made = self._asked(each, partial(self.inner.said, wanted, layout, positions, ids))
            for rollout, index, key in each:
                values = {fact: made[fact][index].cpu() for fact in wanted}
                self.begun.put(key, rollout.id, values)
            return made
        found = self._found(each, wanted)
        places = [at for _, at, _ in each]
        missing = [at for at, values in zip(places, found) if values is None]
        parts = [values for values in found if values is not None]
        order = [at for at, values in zip(places, found) if values is not None]
        if missing:
            rest = torch.cat(missing)
            now = self.inner.facts(wanted, layout, positions[rest.to(positions.device)], {})
            parts.append({fact: values.cpu() for fact, values in now.items()})
            order.append(rest)
        else:
            self.inner.same_weights()
        return {
            fact: in_order([part[fact] for part in parts], order, positions.device)
            for fact in wanted
        }


@dataclass
class EarlyStates(_Early):
    """Hidden states of servers (`client_serve.HiddenStates`)."""

    @property
    def heads(self) -> list[Head]:
        heads: list[Head] = self.inner.heads
        return heads

    def cut(self, vocab: int | None) -> Self:
        """The same teacher, its head kept to the first rows."""
        return replace(self, inner=self.inner.cut(vocab))

    def source(self, layout: Layout, positions: Tensor) -> Any:
        """A `head.Source` at flat positions [N]."""
        each = self._each(layout, positions)
        if self.begun.beginning:
            source: Any = self._asked(each, partial(self.inner.source, layout, positions))
            for rollout, index, key in each:
                at = positions[index.to(positions.device)]
                hidden = source.hidden[source.index[at]].cpu()
                self.begun.put(key, rollout.id, {"hidden": hidden})
            return source
        found = self._found(each, ["hidden"])
        where = positions.cpu()
        parts = [where[at] for (_, at, _), values in zip(each, found) if values is not None]
        hidden = [values["hidden"] for values in found if values is not None]
        missing = [where[at] for (_, at, _), values in zip(each, found) if values is None]
        rest = torch.cat(missing) if missing else where[:0]
        now = self.inner.source(layout, rest.to(positions.device))
        if missing:
            parts.append(rest)
            hidden.append(now.hidden[now.index[rest.to(now.index.device)]].cpu())
        return source_of(now.head, layout, parts, hidden, positions.device)
