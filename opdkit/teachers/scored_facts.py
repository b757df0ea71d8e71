"""Facts from what models elsewhere answer: the log-probs that a vLLM engine or server gives of a
prompt's tokens, or numbers of parts of what was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from opdkit.models.engines.prompt_logprobs import JSON_FLOOR, PromptScores, parse_prompt_logprobs
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.supply import Tensors
from opdkit.teachers.base import in_order

__all__ = [
    "JSON_FLOOR",
    "PromptScores",
    "asked_by_parts",
    "parse_prompt_logprobs",
    "without_positions",
]


def without_positions(fact: Fact, device: torch.device) -> Tensor:
    """[0] or [0, k]: a fact at no position."""
    return torch.zeros((0, *fact.shape), dtype=fact.dtype, device=device)


def asked_by_parts(
    wanted: Collection[Fact],
    positions: Tensor,
    parts: Sequence[Tensor],
    ids: Mapping[TopFact, Tensor],
    ask: Callable[[Sequence[Mapping[TopFact, Tensor]]], Sequence[Mapping[str, Tensor]]],
) -> Tensors:
    """The wanted facts [N] or [N, k] at flat positions [N] of a model elsewhere, which is asked
    about parts of them, [n] each.

    ask: from the rows [n, k] of `ids` [N, k] that belong to each part to the answers about it: the
    facts [n] or [n, k], by their place among the wanted ones in order.
    """
    if not parts:
        return {fact: without_positions(fact, positions.device) for fact in wanted}
    where = positions.cpu()
    place = torch.zeros(int(where.max()) + 1, dtype=torch.int64)
    place[where] = torch.arange(len(where))
    index = [place[part] for part in parts]
    found = ask([{fact: values.cpu()[at] for fact, values in ids.items()} for at in index])
    return {
        fact: in_order([answer[str(i)] for answer in found], index, positions.device)
        for i, fact in enumerate(sorted(wanted, key=repr))
    }
