"""Facts from the log-probs that a vLLM engine or server gives of a prompt's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from opdkit.models.engines.prompt_logprobs import JSON_FLOOR, PromptScores, parse_prompt_logprobs
from opdkit.objective.facts import Fact

__all__ = ["JSON_FLOOR", "PromptScores", "parse_prompt_logprobs", "without_positions"]


def without_positions(fact: Fact, device: torch.device) -> Tensor:
    """[0] or [0, k]: a fact at no position."""
    return torch.zeros((0, *fact.shape), dtype=fact.dtype, device=device)
