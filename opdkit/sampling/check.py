"""What every sampler refuses: another model than its own, and prompts that it cannot continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkit.base.errors import UserError
from opdkit.models.limits import context_limit
from opdkit.models.load import CausalLM
from opdkit.objective.head import Head
from opdkit.types import Prompt, Sampling


def check_prompts(
    prompts: Sequence[Prompt], sampling: Sampling, model: CausalLM, head: Head
) -> int:
    """Refuses prompts that cannot be sampled from; returns the tokens that the longest rollout may
    have.
    """
    limit = context_limit(model.config)
    embedding: Any = model.get_input_embeddings()
    known, rows = len(embedding.weight), head.size(embedding.weight)
    seen: set[tuple[str, int]] = set()
    for prompt in prompts:
        length = len(prompt.tokens) + sampling.max_completion_length
        if (prompt.id, prompt.number) in seen:
            raise UserError(
                f"two prompts have the id {prompt.id!r}, which keys the random draws: for more "
                "responses raise num_generations, or give the second another `number`"
            )
        seen.add((prompt.id, prompt.number))
        if not prompt.tokens:
            raise UserError(
                f"prompt {prompt.id!r} has no tokens: the model needs at least one to continue"
            )
        if limit is not None and length > limit:
            raise UserError(
                f"prompt {prompt.id!r} has {len(prompt.tokens)} tokens, with "
                f"max_completion_length={sampling.max_completion_length} that is {length}, but the "
                f"model has {limit} positions: shorten the prompt or lower max_completion_length"
            )
        if len(prompt.prefix) > sampling.max_completion_length:
            raise UserError(
                f"the prefix of prompt {prompt.id!r} has {len(prompt.prefix)} tokens, more than "
                f"max_completion_length={sampling.max_completion_length}: shorten the prefix or "
                "raise the limit"
            )
        if max(prompt.tokens) >= known or max(prompt.prefix, default=0) >= rows:
            raise UserError(
                f"prompt {prompt.id!r} holds token id {max(prompt.tokens + prompt.prefix)}, but "
                f"the model embeds {known} ids and its head has {rows}: it was tokenised with "
                "another model's tokenizer"
            )
    return max(len(p.tokens) for p in prompts) + sampling.max_completion_length


def check_model(own: CausalLM, trained: CausalLM) -> None:
    """Refuses to follow another model than the one that is sampled from."""
    if trained is not own:
        raise ValueError("this sampler samples from another model than the one that was trained")
