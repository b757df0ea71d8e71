"""Samplers that share the prompts of a step: each that is free takes the next part; what one leaves
undone, another does.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from opdkit.base.errors import UserError
from opdkit.run.cluster.actors import EVERY, Lost
from opdkit.teachers.pool import Gone, Span
from opdkit.types import Prompt, Rollout

SLOW = (
    3.0  # a part that takes so many times longer than the quickest needs is written once more ...
)
LEAST = 0.5  # ... by who is free, but not before so many seconds


class Writer(Protocol):
    """A sampler elsewhere: calls one of its methods. `Gone`: it is not there now, `Lost`: for good.

    load(weights, what): takes weights over, what `Crew.send` was given; returns its log-probs of
    the probe. sample(weights, prompts, asked): rollouts by these weights, None where it has others.
    alive(): nothing, once it can be asked.
    """

    def __call__(self, method: str, *arguments: Any) -> Any: ...


@dataclass(eq=False)
class Part:
    """Some prompts of a step, asked together, whoever writes their responses."""

    prompts: list[Prompt]
    made: list[Rollout] | None = None
    by: set[str] = field(default_factory=set)  # who writes it now
    since: float = 0.0  # when the last of them began


@dataclass(frozen=True)
class Sent:
    """Weights that samplers write with."""

    name: str  # other weights have another
    what: Any
    check: Callable[[str, Any], None]  # of who has loaded them, and its log-probs of the probe


@dataclass(eq=False)
class Request:
    """What samplers are asked for."""

    sent: Sent
    asked: Any
    parts: list[Part]


class Crew:
    """Hands parts to samplers, each in a thread of its own.

    Arguments:
        find: the samplers that there are, by name; asked at each request, so that one which came
            late joins.
        patience: seconds after which a request fails while no sampler is there.
    """

    def __init__(self, find: Callable[[], Mapping[str, Writer]], patience: float):
        self.find, self.patience = find, patience
        self.changed = threading.Condition()
        self.sent: Sent | None = None
        self.request: Request | None = None
        self.failed: BaseException | None = None
        self.alive: dict[str, bool] = {}  # of each that was found
        self.alone = time.monotonic()  # since when none is there
        self.seconds: dict[str, float] = {}  # of the last part that each has written
        self.wrote: Counter[str] = Counter()  # rollouts that were taken, by who wrote them
        self.restarts = 0
        self.said = ""  # of the last that was lost
        self._spans: list[Span] = []

    # ------------------------------------------------------------------------------ for the trainer

    def send(self, sent: Sent) -> None:
        """From now on samplers write with these weights; each loads them when it is free."""
        with self.changed:
            self.sent = sent
            self.changed.notify_all()
        self._join()

    def write(
        self,
        parts: Sequence[Sequence[Prompt]],
        asked: Any,
        hear: Callable[[list[Rollout]], None] = lambda made: None,
    ) -> list[list[Rollout]]:
        """The rollouts of each part, by the weights that were sent last; `hear` is told of each
        part once it is there.
        """
        self._join()
        with self.changed:
            assert self.sent is not None
            request = Request(self.sent, asked, [Part(list(prompts)) for prompts in parts])
            self.request = request
            self.changed.notify_all()
        waiting = list(request.parts)
        try:
            while waiting:
                for part in self._made(waiting):
                    waiting.remove(part)
                    hear(part.made or [])
        finally:
            self.request = None
        return [part.made or [] for part in request.parts]

    def _made(self, waiting: Sequence[Part]) -> list[Part]:
        """Those of some parts that are there now, waited for a little."""
        with self.changed:
            if all(part.made is None for part in waiting):
                self.changed.wait(EVERY)
            if self.failed is not None:
                raise self.failed
            self._refuse_alone(len(waiting))
            return [part for part in waiting if part.made is not None]

    def counts(self) -> dict[str, float]:
        """Of the whole run so far."""
        with self.changed:
            wrote = {f"sampler/rollouts/{name}": float(n) for name, n in sorted(self.wrote.items())}
            there = float(sum(self.alive.values()))
            return wrote | {"sampler/there": there, "sampler/lost": float(self.restarts)}

    def spans(self) -> list[Span]:
        """Who did what since this was asked for last, in unix seconds."""
        with self.changed:
            taken, self._spans = self._spans, []
        return taken

    def _refuse_alone(self, left: int) -> None:
        if any(self.alive.values()):
            self.alone = time.monotonic()
        elif time.monotonic() - self.alone > self.patience:
            raise UserError(
                f"none of the samplers ({', '.join(self.alive) or 'none was started'}) has been "
                f"there for {self.patience:g} s, and {left} parts of the step's prompts are not "
                f"written{self.said and f' ({self.said})'}. Look at their logs: out of memory is "
                "the usual cause. Nothing was learnt from this step; continue with --resume"
            )

    def _join(self) -> None:
        """A thread for each sampler that has none."""
        for name, writer in self.find().items():
            with self.changed:
                if name in self.alive:
                    continue
                self.alive[name] = False
            threading.Thread(target=self._work, args=(name, writer), daemon=True).start()

    # ---------------------------------------------------------------------------------- in threads

    def _work(self, name: str, writer: Writer) -> None:
        loaded: Sent | None = None
        try:
            self._await(name, writer)
            while True:
                sent, part, asked = self._next(name, loaded)
                try:
                    if part is None:
                        loaded = self._load(name, writer, sent)
                    elif not self._write(name, writer, sent, part, asked):
                        loaded = None  # it was started again, and has lost them
                except Gone as error:
                    loaded = None
                    self._left(name, error)
                    self._await(name, writer)
                finally:
                    if part is not None:
                        with self.changed:
                            part.by.discard(name)
                            self.changed.notify_all()
        except Lost as error:
            with self.changed:
                self.said = f"{name}: {error}"
                self.alive.pop(name, None)
        except BaseException as error:  # of the request, whoever writes it
            with self.changed:
                self.failed = error
                self.changed.notify_all()

    def _await(self, name: str, writer: Writer) -> None:
        """Until it can be asked."""
        while True:
            try:
                writer("alive")
                break
            except Lost:
                raise
            except Gone:
                time.sleep(EVERY)
        with self.changed:
            self.alive[name] = True

    def _left(self, name: str, error: Gone) -> None:
        with self.changed:
            self.alive[name] = False
            self.alone = time.monotonic()
            self.restarts += 1
        if isinstance(error, Lost):
            raise error

    def _next(self, name: str, loaded: Sent | None) -> tuple[Sent, Part | None, Any]:
        """What a free sampler does next: load the weights (no part), or write a part."""
        with self.changed:
            while True:
                if self.sent is not None and loaded is not self.sent:
                    return self.sent, None, None
                request = self.request
                if request is not None and request.sent is loaded:
                    part = self._open(request)
                    if part is not None:
                        part.by.add(name)
                        part.since = time.monotonic()
                        return request.sent, part, request.asked
                self.changed.wait(EVERY)

    def _open(self, request: Request) -> Part | None:
        """A part that nobody writes, or one that takes too long."""
        left = [part for part in request.parts if part.made is None]
        free = [part for part in left if not part.by]
        if free or not left or not self.seconds:
            return free[0] if free else None
        usual = min(self.seconds.values())
        oldest = min(left, key=lambda part: part.since)
        late = time.monotonic() - oldest.since > max(LEAST, SLOW * usual)
        return oldest if late else None

    def _load(self, name: str, writer: Writer, sent: Sent) -> Sent:
        began = time.time()
        sent.check(name, writer("load", sent.name, sent.what))
        with self.changed:
            self._spans.append([f"sampler:{name}", "load", began, time.time()])
        return sent

    def _write(self, name: str, writer: Writer, sent: Sent, part: Part, asked: Any) -> bool:
        """Whether it has the weights; then the part is written."""
        began = time.time()
        made = writer("sample", sent.name, part.prompts, asked)
        if made is None:
            return False
        ended = time.time()
        with self.changed:
            self.seconds[name] = ended - began
            self._spans.append([f"sampler:{name}", "sample", began, ended])
            if part.made is None:
                part.made = made
                self.wrote[name] += len(made)
            self.changed.notify_all()
        return True
