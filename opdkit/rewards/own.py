"""Rewards of a person's own file: called in a confined process, unless they ask otherwise."""

from __future__ import annotations

import hashlib
import inspect
import pickle
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from opdkit.base.address import load_address
from opdkit.base.errors import UserError
from opdkit.rewards.workers import ConfinedWork, cores
from opdkit.types import Rollout

SECONDS = 30.0  # of a processor, for one response
# the column of a row that holds the response with which one is compared: its text, tokens, finish
OPPONENT = "opponent"
FIELDS = [f.name for f in fields(Rollout) if f.name != "notes"]


def load_own(address: str) -> Any:
    """The reward that `file.py:name` names."""
    reward = load_address(address)
    many = hasattr(reward, "score_many")
    if not callable(reward) and not many:
        raise UserError(
            f"reward {address!r} is {reward!r}, not a function: name one that takes a Rollout "
            "and returns a number"
        )
    if not getattr(reward, "confined", True):
        return reward
    pairwise = not many and takes_two(reward)
    least = getattr(reward, "correct_from", None)
    path, _, name = address.rpartition(":")
    own = Own(str(Path(path).expanduser().resolve()), name, many, least, reward, pairwise)
    own.check()
    return own


@dataclass(frozen=True)
class Own:
    """A function or object of a file. It gets no network, no files but Python's own, no other
    processes and no environment, and each call begins with the file as it was read.

    many: it takes a whole batch. correct_from: the reward's own. reward: as this process read it.
    pairwise: it takes (row, a, b) and says how probably answer a is better than b (see `against`).
    """

    path: str
    name: str
    many: bool
    correct_from: float | None
    reward: Any
    pairwise: bool = False

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def jail(self) -> ConfinedWork:
        content = Path(self.path).read_bytes()
        digest = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        more = dict.fromkeys([str(Path(self.path).parent), *map(_absolute, sys.path)])
        return ConfinedWork(
            "functions", self.name, self.otherwise, (self.path, self.name, digest, *more)
        )

    @property
    def otherwise(self) -> str:
        return f"write {self.name}.confined = False below it in {Path(self.path).name}"

    def check(self) -> None:
        """Refuse a machine on which it cannot be confined, and what it refuses itself."""
        if sys.platform != "linux":
            raise UserError(
                f"the reward {self.name!r} reads what a model wrote, and only Linux can confine "
                f"it: score on Linux, or {self.otherwise}"
            )
        self.jail.check()
        if hasattr(self.reward, "check"):
            self.reward.check()

    def __call__(self, rollout: Rollout) -> float:
        return self.score_many([rollout])[0]

    def score_many(self, rollouts: Sequence[Rollout]) -> list[Any]:
        """Values as the function gave them: numbers, with the words beside them where there are
        any; those that are no numbers as text.
        """
        if not rollouts:
            return []
        if self.many:
            return self._ask(rollouts)
        with ThreadPoolExecutor(min(cores(), len(rollouts))) as pool:
            return [value for [value] in pool.map(lambda r: self._ask([r]), rollouts)]

    def _ask(self, rollouts: Sequence[Rollout]) -> list[Any]:
        told = [
            two_of(r) if self.pairwise else {name: getattr(r, name) for name in FIELDS}
            for r in rollouts
        ]
        how = "two" if self.pairwise else self.many
        message = pickle.dumps((told, how, SECONDS * len(rollouts))).hex()
        good, values = self.jail.ask(message)
        name = f"rollout {rollouts[0].id!r}" + (
            f" and {len(rollouts) - 1} more" if len(rollouts) > 1 else ""
        )
        if not good:
            raise UserError(
                f"the reward {self.name} failed on {name}: {values}. A reward must give every "
                f"response a number, also empty and cut ones; this one ends "
                f"{rollouts[0].text[-80:]!r}. It runs without network, environment, other "
                "processes and files but Python's own, since it reads what a model wrote: where "
                f"it needs them, a GPU, another reward or what it kept from earlier calls, "
                f"{self.otherwise}"
            )
        if not self.many and isinstance(values[0], list):
            raise UserError(
                f"the reward {self.name} returned {values[0][0]} ({values[0][1]}) for {name}, "
                "which cannot be averaged or compared: return a finite float, 1.0 for right and "
                "0.0 for wrong"
            )
        return values


def takes_two(reward: Any) -> bool:
    """Whether a function takes three arguments that it has no defaults for: (row, a, b)."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in places for p in parameters) == 3


def two_of(rollout: Rollout) -> tuple[dict[str, Any], str, str]:
    """The row, the answer, and the one beside it: what a judge of two is told."""
    row = {name: value for name, value in rollout.row.items() if name != OPPONENT}
    return row, rollout.text, rollout.row[OPPONENT]["text"]


def _absolute(entry: str) -> str:
    return str(Path(entry or ".").resolve())
