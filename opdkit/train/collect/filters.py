"""What is dropped, charged and marked once a step's rollouts are written.

DAPO does two things besides its loss: it drops prompts that teach nothing, and charges for answers
near the length limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opdkit.types import Rollout


def informative(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Dynamic sampling's rule: the rollouts of prompts that some of them solved and some did not
    (arXiv 2503.14476).

    All right or all wrong, a group's advantages are zero. Sample further prompts until the batch is
    full. Accuracy decides, not reward, which shaping may have moved.
    """
    verdicts: dict[str, set[bool | None]] = {}
    for rollout in rollouts:
        verdicts.setdefault(rollout.group, set()).add(rollout.correct)
    return [rollout for rollout in rollouts if {True, False} <= verdicts[rollout.group]]


def overlong_penalty(length: int, max_completion_length: int, margin: int) -> float:
    """In [-1, 0]: 0 up to max_completion_length - margin tokens, then falling in a straight line to
    -1 at max_completion_length.
    """
    if margin < 1:
        raise ValueError(
            f"margin={margin} must be at least 1: the tokens before the limit over which the "
            "penalty grows"
        )
    return -min(max((length - (max_completion_length - margin)) / margin, 0.0), 1.0)


def shape_overlong(
    rollouts: Sequence[Rollout], max_completion_length: int, margin: int
) -> list[Rollout]:
    """Rollouts with the penalty added to their reward; `correct` stays.

    DAPO: a limit of 20480 tokens, a margin of 4096.
    """
    return [
        r
        if r.reward is None
        else replace(
            r, reward=r.reward + overlong_penalty(len(r.tokens), max_completion_length, margin)
        )
        for r in rollouts
    ]


def newlines(tokenizer: Any) -> frozenset[int]:
    """Tokens whose text contains a line end."""
    ids = sorted(tokenizer.get_vocab().values())
    return frozenset(
        i for i, text in zip(ids, tokenizer.batch_decode([[i] for i in ids])) if "\n" in text
    )
