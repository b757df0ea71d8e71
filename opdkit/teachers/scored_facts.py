"""Facts from the log-probs that a vLLM engine or server gives of a prompt's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from opdkit.models.engines.prompt_logprobs import JSON_FLOOR, Scored, parse_prompt_logprobs
from opdkit.objective.facts import Fact, LogpAtFact, LogpFact, TopFact

__all__ = ["JSON_FLOOR", "Scored", "parse_prompt_logprobs", "read_fact", "without_positions"]


def read_fact(fact: Fact, scored: Scored) -> Tensor:
    """[n] or [n, k]: what the scores say of a model itself."""
    if isinstance(fact, LogpFact):
        return scored.logp
    if isinstance(fact, TopFact):
        return scored.top_ids[:, : fact.k]
    assert isinstance(fact, LogpAtFact) and fact.owner == fact.model, fact
    return scored.top_logp[:, : fact.k]


def without_positions(fact: Fact, device: torch.device) -> Tensor:
    """A fact at no position."""
    kind = torch.int64 if isinstance(fact, TopFact) else torch.float32
    shape = (0, fact.k) if isinstance(fact, (TopFact, LogpAtFact)) else (0,)
    return torch.zeros(shape, dtype=kind, device=device)
