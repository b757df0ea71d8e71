"""Rollouts of chosen lengths, and what a model says of them computed the naive way: each row alone,
the whole model, no padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opdkit.types import Rollout

# tokens of prompt and response; one response is empty
LENGTHS = ((3, 5), (7, 2), (1, 8), (4, 0), (6, 1))


def rollouts(
    seed: int = 0, lengths: Any = LENGTHS, vocabulary: int = 320, **fields: Any
) -> list[Rollout]:
    """Random tokens; the recorded log-probs are made up."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, (prompt, response) in enumerate(lengths):
        ids = torch.randint(vocabulary, (prompt + response,), generator=generator).tolist()
        logp = [-1.0 - 0.1 * t for t in range(response)]
        made.append(
            Rollout(
                f"0/{i}/0",
                ids[:prompt],
                ids[prompt:],
                [True] * response,
                logp,
                logp,
                f"prompt {i}",
                **fields,
            )
        )
    return made


def naive_logps(model: Any, rollout: Rollout) -> Tensor:
    """[T, V]: the model's log-probs at each response token."""
    ids = torch.tensor([rollout.prompt + rollout.tokens])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    return logits[len(rollout.prompt) - 1 : -1].log_softmax(-1)
