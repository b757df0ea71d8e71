"""A pool of workers that many teachers share: each holds one teacher at a time, and swaps it by
what is asked for.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from opdkit.base.errors import UserError

PATIENCE = (
    30.0  # seconds after which a request is late: a worker swaps for it when its turn is over
)
# a turn lasts at least so many times as its swap, so that swaps take at most a quarter of the time
TURN = 4.0
# a second copy is made where a queue would take so many times longer than the swap: with n copies
# it pays from 1 on (T / (n r) > swap), and the swap back costs as much again
COPY = 2.0
TRIES = 3  # workers that a request may lose before it is given up
SPANS = 1 << 12  # of the timeline that are kept


class Gone(Exception):
    """A worker that is no more: its process ended, or its machine is out of reach."""


class Worker(ABC):
    """Where one teacher at a time is held: a process, an actor, a device.

    Both methods are called by one thread, one call at a time. `Gone` says that the worker has to be
    replaced; any other error is the request's own.
    """

    @abstractmethod
    def load(self, name: str) -> None:
        """Hold the teacher of this name from now on, and no other."""

    @abstractmethod
    def call(self, name: str, request: Any) -> Any:
        """The answer of the teacher that it holds."""

    def close(self) -> None:
        """The end of it; also of one that is gone."""
        return


@dataclass
class Job:
    """A request to a teacher."""

    teacher: str
    request: Any
    tokens: int  # that it has the teacher read
    since: float  # when it was asked
    answer: Future[Any] = field(default_factory=Future)
    lost: int = 0  # workers that were gone before they answered
    begun: bool = False


@dataclass
class Place:
    """A worker as the schedule sees it."""

    number: int
    holds: str | None = None  # the teacher, from the beginning of its swap on
    since: float = 0.0  # when that began
    loaded: str | None = None  # the teacher, once the swap is done
    used: float = 0.0  # when its last job ended
    job: Job | None = None  # under way
    closed: bool = False  # it takes no more


@dataclass
class Tally:
    """What was done for one teacher: seconds are summed over workers and requests."""

    requests: int = 0
    tokens: int = 0
    busy: float = 0.0  # scoring
    waited: float = 0.0  # from being asked to being begun, a swap included
    swaps: int = 0
    swapping: float = 0.0


@dataclass
class Schedule:
    """Which free worker takes which request: decided by what waits and what was measured, with no
    clock of its own.

    A worker goes on with the teacher that it holds while that has work. Else it swaps to the
    teacher with most waiting tokens that no other worker holds, or, where all that wait are held,
    to a second copy of one whose queue would take `COPY` times longer than the swap. A request that
    has waited for `patience` seconds is late: a worker whose turn is over (`patience`, or `TURN`
    swaps) swaps for it though its own teacher has work. So none of n teachers waits longer than n
    turns.
    """

    places: list[Place]
    patience: float = PATIENCE
    waiting: dict[str, deque[Job]] = field(default_factory=dict)  # none of them empty
    tallies: dict[str, Tally] = field(default_factory=dict)

    def add(self, job: Job, first: bool = False) -> None:
        """first: before those that were asked since, as it was begun once."""
        queue = self.waiting.setdefault(job.teacher, deque())
        queue.appendleft(job) if first else queue.append(job)

    def assign(self, now: float) -> list[Place]:
        """The places that have a new job; one that swaps for it `holds` the new teacher already."""
        begun = []
        free = [p for p in self.places if p.job is None and not p.closed]
        # first those that go on; then who holds nothing, then whose teacher was used longest ago
        for place in sorted(
            free, key=lambda p: (p.holds not in self.waiting, p.holds is not None, p.used, p.number)
        ):
            teacher = self._next(place, now)
            if teacher is None:
                continue
            if teacher != place.holds:
                place.holds, place.since = teacher, now
            place.job = self.waiting[teacher].popleft()
            if not self.waiting[teacher]:
                del self.waiting[teacher]
            begun.append(place)
        return begun

    def drop(self, teacher: str) -> list[Job]:
        """All that wait for a teacher; they are no longer in the queue."""
        return list(self.waiting.pop(teacher, ()))

    def tally(self, teacher: str) -> Tally:
        return self.tallies.setdefault(teacher, Tally())

    def swap_seconds(self, teacher: str) -> float | None:
        """What a swap to a teacher takes: as measured, else as others took; None: none did yet."""
        tally = self.tally(teacher)
        known = [tally] if tally.swaps else [t for t in self.tallies.values() if t.swaps]
        count = sum(t.swaps for t in known)
        return sum(t.swapping for t in known) / count if count else None

    def rate(self, teacher: str) -> float | None:
        """Tokens a second of one worker that holds a teacher, known as `swap_seconds` is."""
        tally = self.tally(teacher)
        known = [tally] if tally.busy > 0 else list(self.tallies.values())
        busy = sum(t.busy for t in known)
        return sum(t.tokens for t in known) / busy if busy > 0 else None

    def _next(self, place: Place, now: float) -> str | None:
        """The teacher whose oldest request a free place takes; None: it stays idle."""
        others = {p.holds for p in self.places if p is not place and not p.closed}
        unheld = [t for t in self.waiting if t not in others and t != place.holds]
        late = [t for t in unheld if self._age(t, now) > self.patience]
        if place.holds in self.waiting:
            turn = max(self.patience, TURN * (self.swap_seconds(str(place.holds)) or 0.0))
            if not late or now - place.since <= turn:
                return place.holds
        if late:
            return max(late, key=lambda t: self._age(t, now))
        # without work for its own, what nobody holds goes before a copy
        open_ = unheld or [t for t in self.waiting if self._pays(t, now)]
        return max(open_, key=self._tokens, default=None)

    def _age(self, teacher: str, now: float) -> float:
        return now - self.waiting[teacher][0].since

    def _tokens(self, teacher: str) -> int:
        return sum(job.tokens for job in self.waiting[teacher])

    def _pays(self, teacher: str, now: float) -> bool:
        """Whether another copy of a teacher is worth a swap of an idle worker."""
        if self._age(teacher, now) > self.patience:
            return True
        copies = sum(p.holds == teacher for p in self.places if not p.closed)
        rate, swap = self.rate(teacher), self.swap_seconds(teacher)
        if rate is None or swap is None:
            return False
        return self._tokens(teacher) / (rate * copies) > COPY * swap


Span = list[Any]  # [part, doing, from, to], in unix seconds: a line of a run's timeline


class Pool:
    """Workers that answer requests to many teachers, each in a thread of its own.

    Arguments:
        workers: as many as there are devices; they hold nothing yet.
        replacement: a new worker in the place of one that is gone, by its number; None: there is
            none, and the others go on.
        patience: seconds after which a request is late.
        clock: unix seconds.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        replacement: Callable[[int], Worker] | None = None,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.time,
    ):
        self.workers, self.replacement, self.clock = list(workers), replacement, clock
        self.schedule = Schedule([Place(i) for i in range(len(workers))], patience)
        self.changed = threading.Condition()
        self.closed = False
        self.replaced = 0  # workers
        self._spans: deque[Span] = deque(maxlen=SPANS)
        self.threads = [
            threading.Thread(target=self._work, args=(place,), name=f"pool {place.number}")
            for place in self.schedule.places
        ]
        for thread in self.threads:
            thread.daemon = True
            thread.start()

    # ------------------------------------------------------------------------------------ for users

    def submit(self, teacher: str, request: Any, tokens: int) -> Future[Any]:
        """The answer to come. tokens: that the teacher reads for it."""
        job = Job(teacher, request, tokens, self.clock())
        with self.changed:
            if self.closed or all(place.closed for place in self.schedule.places):
                raise UserError("no worker of the pool of teachers is left: look at their errors")
            self.schedule.add(job)
            self._assign()
        return job.answer

    def counts(self) -> dict[str, float]:
        """Of the whole time, for metrics: what the workers did, and the tokens of each teacher."""
        with self.changed:
            tallies = dict(self.schedule.tallies)
            made = {
                "pool/swaps": float(sum(t.swaps for t in tallies.values())),
                "pool/swap_seconds": sum(t.swapping for t in tallies.values()),
                "pool/busy_seconds": sum(t.busy for t in tallies.values()),
                "pool/wait_seconds": sum(t.waited for t in tallies.values()),
                "pool/replaced": float(self.replaced),
            }
            return made | {f"pool/tokens/{n}": float(t.tokens) for n, t in sorted(tallies.items())}

    def tallies(self) -> Mapping[str, Tally]:
        with self.changed:
            return {name: Tally(**vars(tally)) for name, tally in self.schedule.tallies.items()}

    def spans(self, since: float = 0.0) -> list[Span]:
        """What ended after a time, of late: ["teacher:NAME", "score" or "load", from, to]."""
        with self.changed:
            return [span for span in self._spans if span[3] > since]

    def close(self) -> None:
        """What waits is given up; what is under way is finished."""
        with self.changed:
            self.closed = True
            left = self._drop_all()
            self.changed.notify_all()
        for job in left:
            _fail(job, UserError("the pool of teachers was closed before it answered"))
        for thread in self.threads:
            thread.join()
        for worker in self.workers:
            worker.close()

    # ----------------------------------------------------------------------------------- in threads

    def _assign(self) -> None:
        """Under the lock."""
        if self.schedule.assign(self.clock()):
            self.changed.notify_all()

    def _work(self, place: Place) -> None:
        while True:
            with self.changed:
                while place.job is None and not self.closed:
                    if not self.changed.wait(self.schedule.patience):
                        self._assign()  # what was early is late now
                if place.job is None:
                    return
                job = place.job
            if job.begun or job.answer.set_running_or_notify_cancel():
                job.begun = True
                self._do(place, job)
            with self.changed:
                place.job, place.used = None, self.clock()
                self._assign()
                if place.closed:
                    return

    def _do(self, place: Place, job: Job) -> None:
        try:
            self._swap(place, job.teacher)
        except Gone as error:
            return self._lost(place, job, error)
        except Exception as error:  # this teacher cannot be loaded: nor can it for those behind
            with self.changed:
                place.holds = place.loaded = None
                behind = self.schedule.drop(job.teacher)
            for one in (job, *behind):
                _fail(one, error)
            return None
        began = self.clock()
        try:
            answer = self.workers[place.number].call(job.teacher, job.request)
        except Gone as error:
            return self._lost(place, job, error)
        except Exception as error:
            job.answer.set_exception(error)
            return None
        ended = self.clock()
        with self.changed:
            tally = self.schedule.tally(job.teacher)
            tally.requests, tally.tokens = tally.requests + 1, tally.tokens + job.tokens
            tally.busy, tally.waited = tally.busy + ended - began, tally.waited + began - job.since
            self._spans.append([f"teacher:{job.teacher}", "score", began, ended])
        job.answer.set_result(answer)
        return None

    def _swap(self, place: Place, teacher: str) -> None:
        """The teacher into the worker, if it does not hold it."""
        if place.loaded == teacher:
            return
        began = self.clock()
        place.loaded = None
        self.workers[place.number].load(teacher)
        place.loaded = teacher
        ended = self.clock()
        with self.changed:
            tally = self.schedule.tally(teacher)
            tally.swaps, tally.swapping = tally.swaps + 1, tally.swapping + ended - began
            self._spans.append([f"teacher:{teacher}", "load", began, ended])

    def _lost(self, place: Place, job: Job, error: Gone) -> None:
        """A worker is gone: its request goes to another, a new one takes its place."""
        job.lost += 1
        with suppress(Exception):
            self.workers[place.number].close()
        try:
            if self.replacement is None:
                raise error
            self.workers[place.number] = self.replacement(place.number)
            self.replaced += 1
        except Exception:
            place.closed = True
        with self.changed:
            place.holds = place.loaded = None
            left = not all(p.closed for p in self.schedule.places)
            if left and job.lost < TRIES:
                return self.schedule.add(job, first=True)
            jobs = [job] if left else [job, *self._drop_all()]
        for one in jobs:
            _fail(one, UserError(_GIVEN_UP.format(one.teacher, job.lost, error)))
        return None

    def _drop_all(self) -> list[Job]:
        """All that wait, which nobody will begin; under the lock."""
        return [job for t in list(self.schedule.waiting) for job in self.schedule.drop(t)]


_GIVEN_UP = (
    "the teacher {} gave no answer: {} worker(s) of the pool ended while they had the request "
    "({}). Look at their errors: out of memory is the usual one. Nothing was learnt from this step"
)


def _fail(job: Job, error: Exception) -> None:
    """Tells who waits for it, if anyone does: one that was never begun may have been called off."""
    if job.begun or job.answer.set_running_or_notify_cancel():
        job.answer.set_exception(error)
