"""Rewards by name, and their values filled into rollouts."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from numbers import Real

from opdkit.address import is_address, load_address
from opdkit.errors import UserError, nearest
from opdkit.rewards.exact import Exact
from opdkit.rewards.gym import ReasoningGym
from opdkit.rewards.math import Math
from opdkit.rewards.pattern import Pattern
from opdkit.types import Rollout

Reward = Callable[[Rollout], float]

FORMS = ["math", "exact", "regex:PATTERN", "reasoning_gym", "file.py:function"]


def load_reward(spec: str | Reward | None) -> Reward | None:
    """`math`, `exact`, `regex:PATTERN`, `reasoning_gym` or `file.py:function`; a function is itself, None is no reward."""
    if spec is None or callable(spec):
        return spec
    if spec == "math":
        return _with_package("math", "math_verify", Math())
    if spec == "reasoning_gym":
        return _with_package("reasoning_gym", "reasoning_gym", ReasoningGym())
    if spec == "exact":
        return Exact()
    if spec.startswith("regex:"):
        return Pattern(spec.removeprefix("regex:"))
    if is_address(spec):
        reward = load_address(spec)
        if not callable(reward):
            raise UserError(f"reward {spec!r} is {reward!r}, not a function: a reward takes a Rollout and returns a number")
        return reward
    raise UserError(f"there is no reward {spec!r}{nearest(spec, FORMS)}. A reward is one of {', '.join(FORMS)}")


def _with_package(name: str, package: str, reward: Reward) -> Reward:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"the reward {name!r} needs the package {package}, which is not installed: pip install 'opdkit[rewards]'")
    return reward


def score(rollouts: Sequence[Rollout], reward: Reward, *, workers: int = 0) -> list[Rollout]:
    """The rollouts with `reward` and `correct` filled in.

    correct: reward > 0, or reward >= reward.correct_from where the reward says so (scores with partial credit).
    workers: threads, for rewards that wait for something, such as a judge's answer; 0: none.
    """
    if not workers:
        return [_scored(r, reward) for r in rollouts]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda r: _scored(r, reward), rollouts))


def _scored(rollout: Rollout, reward: Reward) -> Rollout:
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        value = reward(rollout)
    except UserError as error:
        raise UserError(f"rollout {rollout.id!r}: {error}") from error
    except Exception as error:
        raise UserError(
            f"the reward {name} failed on rollout {rollout.id!r} with {type(error).__name__}: {error}. A reward must give every "
            f"response a number, also empty and cut ones; this one ends {rollout.text[-80:]!r}"
        ) from error
    if not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(
            f"the reward {name} returned {value!r} ({type(value).__name__}) for rollout {rollout.id!r}, "
            "which cannot be averaged or compared: return a finite float, 1.0 for right and 0.0 for wrong"
        )
    least = getattr(reward, "correct_from", None)
    return replace(rollout, reward=float(value), correct=bool(value > 0 if least is None else value >= least))
