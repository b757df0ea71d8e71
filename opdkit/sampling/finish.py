"""What samplers share: the ids of the rollouts they are asked for, and rollouts with their texts
from the tokens they drew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opdkit.base.errors import UserError
from opdkit.models.thoughts import decode, opened, special_marks
from opdkit.models.tokenizers import special_texts
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
    texts = decode(tokenizer, [response.tokens for response in responses])
    rollouts = []
    for i, (response, text) in enumerate(zip(responses, texts, strict=True)):
        if not all(map(math.isfinite, response.logp)):
            refuse_broken(ids[i])
        prompt = prompts[i // sampling.num_generations]
        guided, length = len(prompt.prefix), len(response.tokens)
        said = text
        if response.stopped:
            said = _cut(text, response.tokens, prompt, sampling.stop, tokenizer)
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
                text=opened(tokenizer, prompt.tokens, said) + said,
                marks={"guided": [t < guided for t in range(length)]} if guided else {},
                row=prompt.row,
                notes=response.notes,
            )
        )
    return rollouts


def names_special(stop: Sequence[str], tokenizer: Any) -> bool:
    """Whether a stop string holds the name of a special token: then texts are looked for stop
    strings with special tokens in them, else without.
    """
    return bool(stop) and any(name in s for name in special_texts(tokenizer) for s in stop)


def with_stops(stop: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """How tokens are decoded to be looked for stop strings."""
    return DECODE | {"skip_special_tokens": not names_special(stop, tokenizer)}


def _cut(text: str, tokens: list[int], prompt: Prompt, stop: Sequence[str], tokenizer: Any) -> str:
    """The text before the first stop string that the student wrote; all of it where it wrote none
    and ended by a token.
    """
    if not stop:
        return text
    named = names_special(stop, tokenizer)

    def read(ids: list[int]) -> str:
        if named:
            return str(tokenizer.decode(ids, **with_stops(stop, tokenizer)))
        return decode(tokenizer, [ids])[0]

    whole = read(tokens)
    start = len(read(prompt.prefix)) if prompt.prefix else 0
    at = min((found for s in stop if (found := whole.find(s, start)) >= 0), default=None)
    if at is None:
        return text
    kept = whole[:at]
    left = set(special_marks(tokenizer).values())  # of thoughts
    for name in special_texts(tokenizer) if named else ():
        kept = kept if name in left else kept.replace(name, "")
    return kept


def refuse_broken(id: str) -> None:
    raise UserError(
        f"the model's logits are not finite for rollout {id!r}: its weights hold nan or inf, or 16 "
        "bits overflowed. Go back to an earlier checkpoint with a lower learning rate, or load the "
        "model with dtype float32"
    )
