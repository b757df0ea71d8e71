"""Scorers of libraries, asked in a confined process about what a model wrote: it can hang them,
crash them and be run by them.

A signal would not do against hanging: it works only in the main thread, and not while Python is
inside one long multiplication.
"""

from __future__ import annotations

import pickle
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from opdkit.rewards.workers import ConfinedWork, cores, unprotected

SECONDS = 2.0  # of a processor for one call, where calls do not hang; most take 0.1
LEAST = 0.2  # where they do
CALM = 60.0  # seconds after which half of the calls that hung are forgotten
FALL = 0.25  # of that time, for each that hung
MANY = 2.0  # calls that hung; no more are counted
MOST = 8  # calls at once: each has a process of some 120 MiB


@dataclass(frozen=True)
class Failed:
    """A call that raised, ran too long or took its process down."""

    why: str


@dataclass
class Patience:
    """How long a call may take: less with each that hung, so that a batch of nothing but answers
    that hang is through in a time that one can wait for.
    """

    hung: float = 0.0
    since: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def seconds(self) -> float:
        with self.lock:
            now = time.monotonic()
            self.hung *= 0.5 ** ((now - self.since) / CALM)
            self.since = now
            return max(LEAST, SECONDS * FALL**self.hung)

    def one_hung(self) -> None:
        with self.lock:
            self.hung = min(self.hung + 1, MANY)


_patience = Patience()


@dataclass(frozen=True)
class Guard:
    """A library's scorer. library: math (math-verify) or gym (reasoning-gym). reward: whose name
    errors say; own: its class.

    unprotected: score also where answers cannot be kept from writing files, the network and other
    processes.
    """

    library: str
    reward: str
    own: str
    unprotected: bool = False

    @staticmethod
    def workers() -> int:
        """Calls worth making at once."""
        return min(cores(), MOST)

    @property
    def jail(self) -> ConfinedWork:
        return ConfinedWork(
            "scores",
            self.reward,
            unprotected(self.own),
            (self.library,),
            unprotected=self.unprotected,
        )

    def __call__(self, *arguments: Any, seconds: float | None = None) -> Any:
        """What the library's function in `jail/scores.py` returns, or `Failed`.

        Threads may call at once. seconds: of a processor; None: as `Patience` says.
        """
        allowed = _patience.seconds() if seconds is None else seconds
        good, value = self.jail.ask(pickle.dumps((arguments, allowed)).hex())
        if good is None and seconds is None:
            _patience.one_hung()
        return value if good else Failed(value)


class Guarded(ABC):
    """A reward that asks a library's scorer about responses."""

    confined = False  # only the scorer is

    @property
    @abstractmethod
    def guard(self) -> Guard:
        """Whom it asks."""

    @property
    def workers(self) -> int:
        """Responses worth scoring at once."""
        return self.guard.workers()

    def check(self) -> None:
        """Refuse a machine on which the scorer cannot be confined, before a run begins."""
        self.guard.jail.check()
