"""How deep into an episode the student acts: a depth that grows with the steps, from the front of
the episode or from its back (TCOD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from opdkit.base.errors import UserError, shown
from opdkit.base.rules import Rules, at_least, follow
from opdkit.curricula.base import Plain
from opdkit.curricula.writer import Memory, StepContext, Writer
from opdkit.types import Prompt, Rollout

DIRECTIONS = ("f2b", "b2f")
EXPERT = "actions"  # the column of the data with the actions of an expert who succeeded
DEPTH: Rules = {
    "direction": (
        lambda direction: direction in DIRECTIONS,
        f"one of {', '.join(DIRECTIONS)}",
        "it is the end of the episode from which the student's turns grow",
    ),
    "eta": at_least(1, "it is how many steps each depth is kept"),
    "start": at_least(1, "it is how many turns the student has at the first step"),
}


def depth(step: int, start: int, eta: int) -> int:
    """k(n) = start + floor(n / eta): turns of the student's at step `step`, from 0."""
    return start + step // eta


def replays(actions: int, turns: int) -> int:
    """max(0, L - k): how many of an expert's L actions are replayed, so that the last k turns are
    the student's.
    """
    return max(0, actions - turns)


@dataclass(frozen=True)
class DepthWriter(Writer):
    """The student, in its first turns ("f2b") or in those after the replayed ones ("b2f").

    Its episodes are not said to be its own: one that was stopped says nothing of how well the
    student does.
    """

    direction: str
    eta: int
    start: int
    acts: ClassVar[bool] = True

    def write(self, context: StepContext) -> list[Rollout]:
        turns = depth(context.step, self.start, self.eta)
        prompts = [self.cut(prompt, turns) for prompt in context.prompts]
        rollouts = context.sample(prompts, context.sampling)
        replayed = {prompt.question for prompt in prompts if prompt.replay}
        # where the replay alone ends the episode, it is lived without: not at the step's depth
        kept = [r for r in rollouts if r.question not in replayed or "given" in r.marks]
        return kept or rollouts

    def cut(self, prompt: Prompt, turns: int) -> Prompt:
        """A prompt whose episode has `turns` turns of the student's."""
        if self.direction == "f2b":
            return replace(prompt, most_turns=turns)
        actions = expert(prompt)
        return replace(prompt, replay=actions[: replays(len(actions), turns)])


def expert(prompt: Prompt) -> tuple[str, ...]:
    """The expert's actions for a prompt; none where its row has no list of them."""
    actions = prompt.row.get(EXPERT)
    if actions is None:
        return ()
    texts = isinstance(actions, Sequence) and all(isinstance(a, str) for a in actions)
    if isinstance(actions, str) or not texts:
        raise UserError(
            f"prompt {prompt.id}: its column {EXPERT!r} is {shown(actions)}, but it is replayed "
            'action by action: give a list of texts, such as ["go south", "open locker"], or '
            "leave it out where no expert has solved the row"
        )
    return tuple(actions)


@dataclass(frozen=True)
class Depth(Plain):
    """TCOD (arXiv 2604.24005): k(n) = start + floor(n / eta) turns of the student's at step n.

    "f2b": an episode is stopped after its first k turns. "b2f": of the L actions in the row's
    column `actions` the first max(0, L - k) are replayed, then the student acts until the episode
    ends; a row without them has a whole episode. Nothing is remembered: the step alone says how
    deep.
    """

    kind: ClassVar[str] = "depth"
    direction: str = "f2b"
    eta: int = 2
    start: int = 1

    def __post_init__(self) -> None:
        follow(DEPTH, self)

    @property
    def writer(self) -> Writer:
        return DepthWriter(self.direction, self.eta, self.start)

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        """The depth, and how many turns of the student's and of the expert's an episode had."""
        found = {"depth": float(depth(step, self.start, self.eta))}
        for name, of in (
            ("student_turns", [r.drawn for r in rollouts]),
            ("expert_turns", [r.marks.get("given", []) for r in rollouts]),
        ):
            turns = [len({t for t, own in zip(r.turns, o) if own}) for r, o in zip(rollouts, of)]
            found |= {name: sum(turns) / len(turns)} if turns else {}
        return found
