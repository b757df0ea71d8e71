"""Rewards by name, and their values filled into rollouts."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from numbers import Real
from typing import Any, TypeVar

from opdkit.base.address import is_address
from opdkit.base.errors import UserError, nearest, shown
from opdkit.rewards.code import Code
from opdkit.rewards.exact import Exact
from opdkit.rewards.gym import ReasoningGym
from opdkit.rewards.jail.feedback import split
from opdkit.rewards.math import Math
from opdkit.rewards.named import Named, applies
from opdkit.rewards.own import load_own
from opdkit.rewards.pattern import Pattern
from opdkit.types import Rollout

# or an object with score_many(rollouts) -> list[float]; in the place of a number there may be words
# beside it (see `jail.feedback.split`)
Reward = Callable[[Rollout], Any]

# the number, whether it is one of a right response, and what was said beside it
Judged = tuple[float, bool, str]

FORMS = ["math", "exact", "regex:PATTERN", "reasoning_gym", "code", "judge:URL", "file.py:function"]


def load_reward(spec: Any, weights: Mapping[str, float] | None = None) -> Any:
    """`math`, `exact`, `regex:PATTERN`, `reasoning_gym`, `code`, `judge:URL`, `file.py:function`; a
    function is itself, None no reward; a mapping of these several, by name, which `weights` may
    weigh.
    """
    if isinstance(spec, Mapping):
        named = {str(name): _named(str(name), one) for name, one in spec.items()}
        return Named(named, dict(weights or {}))
    if weights:
        raise UserError(
            f"reward_weights weighs rewards by name ({', '.join(weights)}), and the run has none "
            "with names: write reward: {accuracy: math, format: ...}, or leave reward_weights out"
        )
    if spec is None or callable(spec):
        return spec
    if not isinstance(spec, str):
        if hasattr(spec, "score_many"):
            return spec
        raise UserError(
            f"a reward is a name, a function of a Rollout, or an object with score_many(rollouts), "
            f"not {spec!r}"
        )
    if spec == "math":
        return _confined(_with_package("math", "math_verify", Math()))
    if spec == "reasoning_gym":
        return _confined(_with_package("reasoning_gym", "reasoning_gym", ReasoningGym()))
    if spec == "code":
        return _confined(Code())
    if spec == "exact":
        return Exact()
    if spec.startswith("judge:"):
        from opdkit.rewards.judge import load_judge

        return load_judge(spec.removeprefix("judge:"))
    if spec.startswith("regex:"):
        return Pattern(spec.removeprefix("regex:"))
    if is_address(spec):
        return load_own(spec)
    raise UserError(f"there is no reward {spec!r}{nearest(spec, FORMS)}")


def _named(name: str, spec: Any) -> Any:
    """One of several: what is wrong with it says which."""
    try:
        return load_reward(spec)
    except UserError as error:
        raise UserError(f"reward.{name}: {error}") from error


Confined = TypeVar("Confined", Code, Math, ReasoningGym)


def _confined(reward: Confined) -> Confined:
    """Refused here, not in the middle of a run, where this machine cannot confine it."""
    reward.check()
    return reward


def _with_package(name: str, package: str, reward: Confined) -> Confined:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"the reward {name!r} needs the package {package}, which is not installed: pip install "
            "'opdkit[rewards]'"
        )
    return reward


def score(rollouts: Sequence[Rollout], reward: Reward, *, workers: int = 0) -> list[Rollout]:
    """The rollouts with `reward` and `correct` filled in.

    correct: reward > 0, or reward >= reward.correct_from where the reward says so (scores with
    partial credit). workers: threads, for rewards that wait for something, such as another process;
    0: as many as the reward's own `workers` says, or none. A reward with a method
    `score_many(rollouts) -> list[float]` is handed all of them at once, and sees to its own
    threads; so is one with `told_many(rollouts) -> list[tuple[float, str]]`, whose texts are what
    it says of each response.

    Of several rewards by name (`Named`) `rewards` is filled in too: each is a number for those
    rollouts that it applies to (it has nothing against the row, and does not give None), `reward`
    their weighted sum, and `correct` what the first of them says.

    What a reward says besides its number becomes the rollout's `feedback`: it may return (number,
    text), {"reward": number, "feedback": text}, or an object with these two. Responses that the
    data has judged already keep what it says of them.
    """
    if any(map(_by_data, rollouts)):
        rest = iter(score([r for r in rollouts if not _by_data(r)], reward, workers=workers))
        return [r if _by_data(r) else next(rest) for r in rollouts]
    if isinstance(reward, Named):
        return _together(rollouts, reward, workers)
    values = _values(rollouts, reward, workers)
    return [_filled(r, *_judged(r, reward, value)) for r, value in zip(rollouts, values)]


def _together(rollouts: Sequence[Rollout], named: Named, workers: int) -> list[Rollout]:
    """Rollouts with each of several rewards that applies to them, and their weighted sum."""
    said: list[dict[str, Judged]] = [{} for _ in rollouts]
    for name, reward in named.rewards.items():
        mine = [i for i, r in enumerate(rollouts) if applies(reward, r.row)]
        for i, value in zip(mine, _values([rollouts[i] for i in mine], reward, workers)):
            if split(value)[0] is not None:
                said[i][name] = _judged(rollouts[i], reward, value)
    return [_summed(r, named, judged) for r, judged in zip(rollouts, said)]


def _summed(rollout: Rollout, named: Named, judged: dict[str, Judged]) -> Rollout:
    if not judged:
        raise UserError(
            f"none of the rewards {', '.join(named.rewards)} gave rollout {rollout.id!r} a number: "
            "None means that a reward does not apply, and to every rollout one has to"
        )
    worth = {name: number for name, (number, _, _) in judged.items()}
    total = sum(named.weights.get(name, 1.0) * number for name, number in worth.items())
    correct = next(right for _, right, _ in judged.values())
    words = "\n".join(text for _, _, text in judged.values() if text)
    return replace(_filled(rollout, total, correct, words), rewards=worth)


def _values(rollouts: Sequence[Rollout], reward: Reward, workers: int) -> list[Any]:
    """What the reward gives for each."""
    many = getattr(reward, "told_many", None) or getattr(reward, "score_many", None)
    if many is not None:
        values = _many(many, rollouts, reward)
        if len(values) != len(rollouts):
            raise UserError(
                f"the reward {_name(reward)} gave {len(values)} values for {len(rollouts)} "
                "rollouts: give one for each"
            )
        return values
    workers = min(workers or getattr(reward, "workers", 0), len(rollouts))
    if workers <= 1:
        return [_value(r, reward) for r in rollouts]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda r: _value(r, reward), rollouts))


def _by_data(rollout: Rollout) -> bool:
    """Whether the data that a response was read from says what it is worth."""
    return rollout.finish == "given" and rollout.reward is not None


def _name(reward: Reward) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def _many(
    many: Callable[[Sequence[Rollout]], Any], rollouts: Sequence[Rollout], reward: Reward
) -> list[Any]:
    try:
        return list(many(rollouts))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        _through(error)
        raise UserError(
            f"the reward {_name(reward)} failed on a batch of {len(rollouts)} rollouts, the first "
            f"{rollouts[0].id!r}, with {type(error).__name__}: {error}. score_many must give a "
            "list with a number for each response, also for empty and cut ones"
        ) from error


def _through(error: BaseException) -> None:
    """A signal that ends the run is an exit of a class of its own, and no failure of a reward."""
    if isinstance(error, SystemExit) and type(error) is not SystemExit:
        raise error


def _value(rollout: Rollout, reward: Reward) -> Any:
    try:
        return reward(rollout)
    except UserError as error:
        raise UserError(f"rollout {rollout.id!r}: {error}") from error
    except (Exception, SystemExit) as error:
        _through(error)
        raise UserError(
            f"the reward {_name(reward)} failed on rollout {rollout.id!r} with "
            f"{type(error).__name__}: {error}. A reward must give every response a number, also "
            f"empty and cut ones; this one ends {rollout.text[-80:]!r}"
        ) from error


def _judged(rollout: Rollout, reward: Reward, value: Any) -> Judged:
    """What a reward gave, taken apart."""
    number, words = split(value)
    if not isinstance(number, Real) or not _finite(number):
        raise UserError(
            f"the reward {_name(reward)} returned {shown(value)} ({type(value).__name__}) for "
            f"rollout {rollout.id!r}, which cannot be averaged or compared: return a finite float, "
            "1.0 for right and 0.0 for wrong; or that and a text of feedback, (0.0, 'too short')"
        )
    worth, least = float(number), getattr(reward, "correct_from", None)
    return worth, bool(worth > 0 if least is None else worth >= least), words


def _filled(rollout: Rollout, worth: float, correct: bool, words: str) -> Rollout:
    return replace(rollout, reward=worth, correct=correct, feedback=words or rollout.feedback)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # 10**400
        return False
