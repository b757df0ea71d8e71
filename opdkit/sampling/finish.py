"""What samplers share: the ids of the rollouts they are asked for, and rollouts with their texts
from the tokens they drew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opdkit.base.errors import UserError
from opdkit.types import Notes, Prompt, Rollout, Sampling

Tick = Callable[[int], object]  # is told how many rollouts are finished so far
DECODE: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


@dataclass(frozen=True)
class Response:
    """What was written after one prompt, its prefix included."""

    tokens: list[int]
    logp: list[float]  # under the plain softmax
    drawn_logp: list[float]  # under the distribution the tokens were drawn from
    stopped: bool  # by a stop token or a stop string, not by its length
    notes: Notes | None = None  # what was watched


def rollout_ids(prompts: Sequence[Prompt], sampling: Sampling, step: int | None) -> list[str]:
    """step/prompt/number, without the step where it is None."""
    start = "" if step is None else f"{step}/"
    return [
        f"{start}{p.id}/{p.number + c}" for p in prompts for c in range(sampling.num_generations)
    ]


def finish(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    ids: Sequence[str],
    responses: Sequence[Response],  # `num_generations` to the first prompt, then to the second, ...
    tokenizer: Any,
    policy_version: int,
) -> list[Rollout]:
    """The rollouts."""
    texts = tokenizer.batch_decode([response.tokens for response in responses], **DECODE)
    rollouts = []
    for i, (response, text) in enumerate(zip(responses, texts, strict=True)):
        if not all(map(math.isfinite, response.logp)):
            refuse_broken(ids[i])
        prompt = prompts[i // sampling.num_generations]
        guided, length = len(prompt.prefix), len(response.tokens)
        rollouts.append(
            Rollout(
                id=ids[i],
                prompt=prompt.tokens,
                tokens=response.tokens,
                trained=[True] * length,
                logp=response.logp,
                drawn_logp=response.drawn_logp,
                group=prompt.group,
                question=prompt.question,
                policy_version=policy_version,
                finish="stop" if response.stopped else "length",
                text=_cut(text, prompt, sampling.stop, tokenizer) if response.stopped else text,
                marks={"guided": [t < guided for t in range(length)]} if guided else {},
                row=prompt.row,
                notes=response.notes,
            )
        )
    return rollouts


def _cut(text: str, prompt: Prompt, stop: tuple[str, ...], tokenizer: Any) -> str:
    """The text before the first stop string that the student wrote."""
    start = len(tokenizer.decode(prompt.prefix, **DECODE)) if stop and prompt.prefix else 0
    return text[: min((at for s in stop if (at := text.find(s, start)) >= 0), default=len(text))]


def refuse_broken(id: str) -> None:
    raise UserError(
        f"the model's logits are not finite for rollout {id!r}: its weights hold nan or inf, or 16 "
        "bits overflowed. Go back to an earlier checkpoint with a lower learning rate, or load the "
        "model with dtype float32"
    )
