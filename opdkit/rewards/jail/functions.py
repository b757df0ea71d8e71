"""Calls a reward of a person's own file about what a model wrote: each call in a confined process
of its own, split off from one that has read the file.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import pickle
import sys
from dataclasses import make_dataclass
from typing import Any

from cell import Jail
from feedback import split
from scores import Split


class Work(Split):
    """What `__main__.py` is asked to do here. path, name: of the reward; digest: of its file,
    so that an edit is seen; more: where the modules lie that it may import.
    """

    def __init__(self, jail: Jail, path: str, name: str, digest: str, *more: str) -> None:
        super().__init__(jail)
        sys.path += [entry for entry in more if entry not in sys.path]
        # as opdkit.base.address names it, and known before it runs: dataclasses look it up
        spec = importlib.util.spec_from_file_location("opdkit_file_reward", path)
        assert spec is not None and spec.loader is not None  # it is a file that ends in .py
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.reward = getattr(module, name)

    def __call__(self, line: str) -> list[Any]:
        """[True, a list of values], or [False or None, why there is none]."""
        # of our own making: rollouts, whose texts are texts
        given, many, seconds = pickle.loads(bytes.fromhex(line))
        two = many == "two"  # answers to compare: (row, a, b) each
        rollouts = [] if two else [_rollout(fields) for fields in given]

        def work() -> list[Any]:
            if two:
                return [_told(self.reward(*arguments)) for arguments in given]
            if many:
                return list(map(_told, self.reward.score_many(rollouts)))
            return [_told(self.reward(rollout)) for rollout in rollouts]

        return self.score(work, seconds)


def _rollout(fields: dict[str, Any]) -> Any:
    """A rollout: opdkit's own where the file imports that, else one with the same fields."""
    types = sys.modules.get("opdkit.types")
    return types.Rollout(**fields) if types else _likeness(tuple(fields))(**fields)


def _likeness(names: tuple[str, ...]) -> Any:
    made = _made.get(names)
    if made is None:
        made = _made[names] = make_dataclass("Rollout", names, frozen=True)
    return made


_made: dict[tuple[str, ...], type] = {}


def _told(value: Any) -> float | dict[str, Any] | list[str] | None:
    """A number, with the words that came with it; None, where the reward does not apply; or what it
    is instead: its look and its type.
    """
    number, words = split(value)
    if number is None:
        return None
    try:
        if isinstance(number, numbers.Real) and math.isfinite(number):
            told = float(number)
            return {"reward": told, "feedback": words} if words else told
    except OverflowError:
        pass
    return [repr(value)[:200], type(value).__name__]
