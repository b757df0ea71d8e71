"""Responses read from the data: the reference response of each prompt."""

from __future__ import annotations

from dataclasses import dataclass

from opdkit.base.errors import UserError
from opdkit.curricula.writer import StepContext, Writer
from opdkit.types import Prompt, Rollout, Sampling


@dataclass(frozen=True)
class DataWriter(Writer):
    """One response per prompt, the one in its data row."""

    @property
    def reads_data(self) -> bool:
        return True

    @property
    def draws(self) -> bool:
        return False

    def sampled(self, sampling: Sampling) -> float:
        return 0

    def rollouts(self, sampling: Sampling) -> int:
        return 1

    def write(self, context: StepContext) -> list[Rollout]:
        longest = context.sampling.max_completion_length
        return [
            given(prompt, context.reference(prompt), longest, f"{context.step}/{prompt.id}/given")
            for prompt in context.once
        ]


def no_response(row: str) -> UserError:
    """The error for a row without a reference response."""
    return UserError(
        f"row {row!r} has no reference response, and the method reads responses from the data: add "
        "a column `response` (or `completion`, `solution`, assistant `messages`), or take a method "
        "whose responses the student writes (gkd: lmbda=1)"
    )


def given(
    prompt: Prompt, response: list[int] | None, longest: int, id: str, text: str | None = None
) -> Rollout:
    """A response of the data, its first `longest` tokens, as a rollout: nobody's log-probs are
    known. text: of a response that is not the row's `response`.
    """
    if not response:
        raise no_response(prompt.id)
    tokens = response[:longest]
    return Rollout(
        id,
        prompt.tokens,
        tokens,
        [True] * len(tokens),
        [],
        [],
        prompt.group,
        finish="given",
        text=str(prompt.row.get("response") or "") if text is None else text,
        marks={"given": [True] * len(tokens)},
        row=prompt.row,
        question=prompt.question,
    )
