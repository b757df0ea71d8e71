"""Who writes a step's responses: what a writer does, and what it is told of the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from opdkit.base.errors import UserError
from opdkit.objective.maths import keyed_uniform
from opdkit.types import Prompt, Rollout, Sampling

Memory = dict[str, Any]  # what a curriculum learns in a run: plain JSON, saved in checkpoints


def nothing_stored(prompt: Prompt) -> list[Rollout]:
    """What a run without a cache has stored."""
    raise UserError(
        f"no rollouts are stored for prompt {prompt.id}: this run reads no folder that `opdkit "
        "cache-teacher` wrote. Set rollouts=cache, or use a writer that does not ask for them"
    )


def nothing_viewed(prompt: Prompt, view: str) -> Prompt:
    """What a step that knows no views has."""
    raise UserError(
        f"prompt {prompt.id} is to be written as the view {view!r} has it, and this step has no "
        "questions to write: views are known where a run trains"
    )


# a response of the data: its token ids, and its text
Answer = tuple[list[int], str]


def no_pair(prompt: Prompt) -> tuple[Answer, Answer]:
    """What a step that knows no pairs has."""
    raise UserError(
        f"the pair of prompt {prompt.id} is asked for, and this step reads no rows: pairs are "
        "known where a run trains"
    )


def nobody(model: str, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
    """What a step in which only the student writes has of another model."""
    raise UserError(
        f"the model {model!r} is to write responses, and this step has none that writes beside the "
        "student: copies of the student write where a run trains with a method that brings them"
    )


def as_it_is(prompt: Prompt) -> list[Prompt]:
    """The turns of a prompt that is no trajectory."""
    return [prompt]


@dataclass(frozen=True)
class StepContext:
    """What a writer is told of a step, and whom it can ask for responses."""

    # of the step; one may come twice, where an epoch ends or the data has fewer than a step takes
    prompts: tuple[Prompt, ...]
    # the run's settings, or shorter responses, where the curriculum says so; `num_generations`
    # responses to each prompt
    sampling: Sampling
    step: int  # steps done
    total_steps: int  # that the run will have taken at its end
    seed: int
    # the student's responses, written now. Prompts may be others than those of the step (a
    # `prefix`, further turns); to one that is asked again the student writes other responses
    sample: Callable[[Sequence[Prompt], Sampling], list[Rollout]]
    # token ids of the reference response to a prompt of the step, None where the data has none
    reference: Callable[[Prompt], list[int] | None]
    stored: Callable[[Prompt], list[Rollout]] = nothing_stored  # its rollouts in the run's cache
    # what the data prefers of two responses to a prompt of the step, and what it does not
    pair: Callable[[Prompt], tuple[Answer, Answer]] = no_pair
    # as `sample`, but written by a copy of the student that the method brings, by its name
    sample_as: Callable[[str, Sequence[Prompt], Sampling], list[Rollout]] = nobody
    # a prompt of the step as a view of its row writes it (see `data.views`): another prompt of the
    # same question and group
    viewed: Callable[[Prompt, str], Prompt] = nothing_viewed
    # the assistant turns of a prompt of the step, where it is a reference trajectory: a prompt each
    turns: Callable[[Prompt], list[Prompt]] = as_it_is
    memory: Memory = field(default_factory=dict)  # the curriculum's, to be read only
    policy_version: int = 0  # optimiser steps that the student has taken

    @property
    def once(self) -> tuple[Prompt, ...]:
        """Each prompt of the step once: for those whose responses are there already, as they would
        be the same again.
        """
        return tuple({prompt.id: prompt for prompt in self.prompts}.values())

    @property
    def coin(self) -> float:
        """The step's uniform draw in [0, 1) of who writes; the same in a resumed run."""
        return keyed_uniform(
            self.seed, self.step, "who writes", torch.zeros(1, dtype=torch.int64), 1, torch.float64
        ).item()


class Writer(ABC):
    """Who writes a step's responses, to which prompts: a frozen dataclass with `write`.

    `write` is called once per step, and again for further prompts of the same step where filters
    drop some. What it draws must depend on the context alone (`context.coin`, or a draw keyed by
    seed and step): a resumed run calls it with the same context and must get the same rollouts.
    """

    # whether every response is the student's own of this step; what is remembered of how well the
    # student now does is true of such responses only
    own: ClassVar[bool] = False
    # whether every response is read from a cache: then the run opens one, and samples nothing
    stored: ClassVar[bool] = False
    # whether it says how far episodes go, which nothing does without an environment
    acts: ClassVar[bool] = False
    # whether it asks for the turns of trajectories: then data without any is left out
    asks_turns: ClassVar[bool] = False
    # whether every response ends at `sampling.max_completion_length`, which a curriculum may lower
    # from step to step
    cuts: ClassVar[bool] = True

    @property
    def reads_data(self) -> bool:
        """Whether it reads the reference responses of the data: then every row needs one."""
        return False

    @property
    def reads_pairs(self) -> bool:
        """Whether it reads pairs of responses of the data: then every row needs one."""
        return False

    @property
    def judged(self) -> frozenset[str]:
        """What its responses say of themselves, "reward" or "correct": a run that reads no more
        than that needs no reward.
        """
        return frozenset()

    @property
    def players(self) -> tuple[str, ...]:
        """The copies of the student that write as well, by name."""
        return ()

    @property
    def views(self) -> tuple[str, ...]:
        """The views under which it has responses written: each row needs what they show."""
        return ()

    @property
    def marks(self) -> frozenset[str]:
        """The marks of its own that it sets, besides those that say who wrote a token."""
        return frozenset()

    @property
    def draws(self) -> bool:
        """Whether any response may be the student's, so that there is a choice of its to credit."""
        return True

    def per_prompt(self, sampling: Sampling) -> int:
        """How many responses of a step answer the same prompt, at least: methods that compare them
        with each other need two.
        """
        return sampling.num_generations

    def sampled(self, sampling: Sampling) -> float:
        """How many responses to a prompt are written in a step, on average over steps: what a step
        will take is reckoned from it.
        """
        return sampling.num_generations

    def rollouts(self, sampling: Sampling) -> int:
        """How many rollouts a step has of each of its prompts, at most."""
        return sampling.num_generations

    @abstractmethod
    def write(self, context: StepContext) -> list[Rollout]:
        """The step's rollouts, with `group` and `question` of their prompts; what the student did
        not draw is marked (see `types.Rollout`).
        """
