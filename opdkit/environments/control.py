"""Tasks of control, by gymnasium, for policies that are language models over bins.

Numbers and tokens are the same thing here: an observed number is written as the token of its bin,
<o17>, and an action is read from such tokens, <a3>, of a tokenizer that has no others. An episode
is then the text that any other episode is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opdkit.base.errors import UserError
from opdkit.base.rules import Rules, at_least, follow
from opdkit.environments.base import Environment, Scored
from opdkit.environments.commands import needs_package
from opdkit.environments.settings import EnvironmentSettings
from opdkit.types import DataRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Numbers = NDArray[np.float64]
ACTION = re.compile(r"<a(\d+)>")
SPECIALS = ("<pad>", "<eos>", "<unk>")
WIDE = 1e30  # a bound beyond it is none: some tasks name the largest float instead of infinity
MOST_OBSERVED = 256  # numbers; beyond are pictures
RULES: Rules = {
    "bins": at_least(2, "with one there is nothing to choose"),
    "observed": at_least(2, "with one there is nothing to see"),
    "hold": at_least(1, "it is the steps of the task for which an action is held"),
    "turn_tokens": at_least(1, "it is the numbers of a decision, a token each"),
    "starts": at_least(1, "each is a row of the data"),
    "first": at_least(0, "it is a seed of the task"),
}


def tokenizer(bins: int, observed: int) -> PreTrainedTokenizerFast:
    """Of observations <o0>, <o1> ..., and actions <a0>, <a1> ..., which are the last ids; whatever
    else a text has is dropped.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    seen = [f"<o{b}>" for b in range(observed)]
    acts = [f"<a{b}>" for b in range(bins)]
    pad, eos, unknown = SPECIALS
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *seen, *acts])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[oa]\d+>"), "removed", invert=True)
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


# --------------------------------------------------------------------------------- numbers and bins


def observed_bins(values: Any, space: Any, bins: int) -> list[int]:
    """The bin of each number of an observation: bins of equal width between its bounds, and the
    first and last beyond them; where it has no bounds, of its arctangent between those of that.
    """
    x, low, high = (np.asarray(v, np.float64).ravel() for v in (values, space.low, space.high))
    bounded = (np.abs(low) < WIDE) & (np.abs(high) < WIDE)
    least, width = np.where(bounded, low, 0.0), np.where(bounded, high - low, 1.0)
    share = np.where(bounded, (x - least) / width, 0.5 + np.arctan(x) / np.pi)
    return [int(b) for b in np.clip(share * bins, 0, bins - 1)]


def action_of(chosen: Sequence[int], space: Any, bins: int) -> Any:
    """What bins of an action mean: of each degree of freedom evenly spaced numbers from its least
    to its most, these two among them; of a task with a few actions, one of them each.
    """
    if hasattr(space, "n"):
        return int(chosen[0])
    low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
    share = np.asarray(chosen, np.float64).reshape(low.shape) / (bins - 1)
    return (low + share * (high - low)).astype(space.dtype)


def action_bins(action: Any, space: Any, bins: int) -> list[int]:
    """The bins whose meaning is nearest to an action: the inverse of `action_of`."""
    if hasattr(space, "n"):
        return [int(action)]
    low, high = (np.asarray(v, np.float64).ravel() for v in (space.low, space.high))
    share = (np.asarray(action, np.float64).ravel() - low) / (high - low)
    return [int(b) for b in np.clip(np.rint(share * (bins - 1)), 0, bins - 1)]


def degrees(space: Any) -> int:
    """How many numbers an action is."""
    return 1 if hasattr(space, "n") else int(np.prod(space.shape))


# --------------------------------------------------------------------------------- the environment


@dataclass(frozen=True)
class ControlSettings(EnvironmentSettings):
    """A task of gymnasium with bins for numbers, such as Pendulum-v1 or CartPole-v1.

    Arguments:
        task: its name in gymnasium.
        options: further arguments of `gymnasium.make`.
        bins: of each number of an action; where the task has a few actions, as many as these.
        observed: bins of each number that is observed.
        hold: steps of the task for which an action is held.
        returns: the sums of the task's rewards that count as 0 and as 1; null: the sum itself is
            the reward.
        solved: sum of rewards from which an episode counts as correct; null: gymnasium's own
            threshold, where the task has one.
        starts: rows, each a start.
        first: seed of the first start; the others follow.
        turn_tokens: numbers of a decision: the task's degrees of freedom, times the actions that
            are decided at once.
    """

    kind = "control"
    task: str = "Pendulum-v1"
    options: dict[str, Any] = field(default_factory=dict)
    bins: int = 256
    observed: int = 256
    hold: int = 1
    returns: tuple[float, float] | None = None
    solved: float | None = None
    starts: int = 1024
    first: int = 0
    turn_tokens: int | None = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turn_tokens is None:
            object.__setattr__(self, "turn_tokens", 1)
        follow(RULES, self)
        if self.returns is not None and not self.returns[0] < self.returns[1]:
            raise ValueError(
                f"returns={list(self.returns)} must be two numbers, the lower one first: the sums "
                "of rewards that count as 0 and as 1"
            )

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        return {"task": text}

    def rows(self) -> list[DataRow]:
        seeds = range(self.first, self.first + self.starts)
        return [{"id": f"start{seed}", "start": seed} for seed in seeds]

    def make(self) -> Control:
        world = _made(self.task, self.options)
        threshold = getattr(world.spec, "reward_threshold", None)
        return Control(world, self, threshold if self.solved is None else self.solved)

    def check(self) -> None:
        world = _made(self.task, self.options)
        try:
            self.refuse_spaces(world.observation_space, world.action_space)
        finally:
            world.close()

    def refuse_spaces(self, observation: Any, action: Any) -> None:
        """Refuses a task whose numbers cannot be written or read so."""
        what = f"environment: the task {self.task}"
        if not hasattr(observation, "low") or np.prod(observation.shape) > MOST_OBSERVED:
            raise UserError(
                f"{what} shows {observation}, and each decision reads an observation as one token "
                f"for each number: use a task that shows up to {MOST_OBSERVED} numbers (a Box)"
            )
        if hasattr(action, "n"):
            if action.n != self.bins or getattr(action, "start", 0):
                raise UserError(
                    f"{what} has {action}, and each of its {action.n} actions is a bin: set "
                    f"bins={action.n} here and in the method, not {self.bins}"
                )
        elif not hasattr(action, "low") or not np.all(np.isfinite([action.low, action.high])):
            raise UserError(
                f"{what} has the actions {action}, and bins lie evenly between two bounds: use a "
                "task whose actions are bounded numbers (a Box) or a few (Discrete)"
            )
        if (self.turn_tokens or 1) % (free := degrees(action)):
            raise UserError(
                f"{what} has {free} degrees of freedom, a token each, and a decision of "
                f"turn_tokens={self.turn_tokens} would end within an action: set turn_tokens to "
                f"{free}, or to a multiple for several actions at once"
            )


def _made(task: str, options: dict[str, Any]) -> Any:
    """The task, by gymnasium."""
    needs_package(ControlSettings.kind, "gymnasium")
    import gymnasium

    try:
        return gymnasium.make(task, **options)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise UserError(
            f"environment: gymnasium cannot make the task {task!r}: {error}. Name one of "
            "gymnasium.registry, such as Pendulum-v1 or CartPole-v1"
        ) from error


class Control(Environment):
    """One episode of a task.

    A number that a decision lacks, or that is no bin, is the middle one.
    """

    def __init__(self, world: Any, settings: ControlSettings, solved: float | None = None):
        self.world, self.settings, self.solved = world, settings, solved
        self.total, self.steps, self.ended = 0.0, 0, False  # total: sum of rewards

    def reset(self, row: DataRow, seed: int) -> str:
        seen, _ = self.world.reset(seed=int(row.get("start", seed)))
        self.total, self.steps, self.ended = 0.0, 0, False
        return self._written(seen)

    def step(self, action: str) -> str:
        settings, space = self.settings, self.world.action_space
        said = [int(b) for b in ACTION.findall(action)][: settings.turn_tokens]
        chosen = [b if b < settings.bins else settings.bins // 2 for b in said]
        chosen += [settings.bins // 2] * ((settings.turn_tokens or 1) - len(chosen))
        free, seen = degrees(space), None
        for at in range(0, len(chosen), free):
            for _ in range(settings.hold):
                if self.ended:
                    break
                act = action_of(chosen[at : at + free], space, settings.bins)
                seen, reward, over, cut, _ = self.world.step(act)
                self.total, self.steps = self.total + float(reward), self.steps + 1
                self.ended = bool(over or cut)
        return self._written(seen)

    @property
    def done(self) -> bool:
        return self.ended

    def score(self) -> Scored:
        low, high = self.settings.returns or (0.0, 1.0)
        solved = None if self.solved is None else self.total >= self.solved
        said = f"return {self.total:.6g} in {self.steps} steps"
        return Scored((self.total - low) / (high - low), solved, said)

    def close(self) -> None:
        self.world.close()

    def _written(self, seen: Any) -> str:
        space, bins = self.world.observation_space, self.settings.observed
        return "".join(f"<o{b}>" for b in observed_bins(seen, space, bins))
