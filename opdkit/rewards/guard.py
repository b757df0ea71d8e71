"""Scorers of libraries, asked in a confined process about what a model wrote: it can hang them,
crash them and be run by them.

A signal would not do against hanging: it works only in the main thread, and not while Python is
inside one long multiplication.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from opdkit.rewards.workers import ConfinedWork, cores

SECONDS = 5.0  # for one call
MOST = 8  # calls at once: each has a process of some 120 MiB


@dataclass(frozen=True)
class Failed:
    """A call that raised, ran too long or took its process down."""

    why: str


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
            "scores", self.reward, self.own, (self.library,), unprotected=self.unprotected
        )

    def __call__(self, *arguments: Any, seconds: float = SECONDS) -> Any:
        """What the library's function in `jail/scores.py` returns, or `Failed`.

        Threads may call at once.
        """
        good, value = self.jail.ask(pickle.dumps((arguments, seconds)).hex())
        return value if good else Failed(value)


class Guarded(ABC):
    """A reward that asks a library's scorer about responses."""

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
