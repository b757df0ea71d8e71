"""Reads vLLM's `prompt_logprobs`, as its engine returns them and as its server writes them in JSON:
by token id, never by column order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError

OTHERS = (
    "the server scored other tokens than it was sent. Nothing was learnt from this step; use "
    "another version of the server"
)
JSON_FLOOR = -9999.0  # what the server writes for minus infinity, which JSON does not have


@dataclass(frozen=True)
class PromptScores:
    """What a model says of n tokens in a row, each given those before it; log-probs of the whole
    vocabulary's softmax, float32.
    """

    logp: Tensor  # [n] of the tokens themselves
    top_ids: Tensor  # [n, k] int64, most probable first
    top_logp: Tensor  # [n, k]


def parse_prompt_logprobs(
    prompt_logprobs: Any, tokens: Sequence[int], start: int, k: int, who: str
) -> PromptScores:
    """The scores of tokens[start:] of one request; `who` names it in errors (the rollout's id and
    the model).

    `prompt_logprobs` has one entry per token of the request. The first is None (nothing precedes
    that token), the others hold the k most probable ids, and the token itself where it is not among
    them: k or k + 1 entries. Accepted are a list of {id: Logprob}, of {"id": {"logprob": x, ...}},
    and vLLM's FlatLogprobs. k = 0 reads the tokens alone.
    """
    if prompt_logprobs is None or len(prompt_logprobs) != len(tokens):
        got = "none" if prompt_logprobs is None else len(prompt_logprobs)
        raise UserError(
            f"{who}: log-probs of {len(tokens)} tokens were asked for, and {got} came back, so "
            "none can be assigned to its token. The server must take token ids as they are (no "
            "special tokens added, nothing truncated) and return prompt_logprobs"
        )
    if start < 1:
        raise UserError(
            f"{who}: nothing precedes the first token, so no model can score it: give the prompt "
            "at least one token"
        )
    _refuse_others(prompt_logprobs, tokens[:start], who)
    ids, logps = _table(prompt_logprobs, start)
    _refuse_broken(ids, logps, start, who)
    own = ids == torch.tensor(tokens[start:], dtype=torch.int64).view(-1, 1)
    if not bool(own.any(1).all()):
        position = start + int((~own.any(1)).nonzero()[0, 0])
        raise UserError(
            f"{who}: the scores of token {position} do not hold its own id {tokens[position]}: "
            f"{OTHERS}"
        )
    logp = logps.masked_fill(~own, -math.inf).amax(1) if len(ids) else logps.new_zeros(0)
    counts = (ids >= 0).sum(1)
    if len(ids) and k > int(counts.min()):
        raise UserError(
            f"{who}: {k} log-probs per token were asked for, and {int(counts.min())} came back: "
            f"start the server with --max-logprobs {k}, or lower the method's k"
        )
    # an appended token falls behind the k, being less probable
    order = logps.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return PromptScores(logp, ids.gather(1, order), logps.gather(1, order))


def _table(prompt_logprobs: Any, start: int) -> tuple[Tensor, Tensor]:
    """Ids [n, m] (-1 where an entry has fewer than m) and log-probs [n, m] (-inf there) of the
    entries from `start` on.
    """
    # FlatLogprobs: the token in front, also where it is among the k
    if hasattr(prompt_logprobs, "start_indices"):
        bounds = list(zip(prompt_logprobs.start_indices, prompt_logprobs.end_indices))[start:]
        rows = [
            _entry(dict(zip(prompt_logprobs.token_ids[a:b], prompt_logprobs.logprobs[a:b])))
            for a, b in bounds
        ]
    else:
        rows = [_entry(entry) for entry in prompt_logprobs[start:]]
    width = max((len(ids) for ids, _ in rows), default=0)
    ids = torch.tensor([row + [-1] * (width - len(row)) for row, _ in rows], dtype=torch.int64)
    logps = torch.tensor(
        [row + [-math.inf] * (width - len(row)) for _, row in rows], dtype=torch.float32
    )
    ids, logps = ids.view(len(rows), width), logps.view(len(rows), width)
    return ids, logps.masked_fill(logps <= JSON_FLOOR, -math.inf)


def _entry(entry: Any) -> tuple[list[int], list[float]]:
    """Ids and log-probs of one position; a log-prob that is absent or null is NaN."""
    if not entry:
        return [], []
    return [int(i) for i in entry], list(_numbers(entry.values()))


def _numbers(values: Iterable[Any]) -> Iterable[float]:
    for value in values:
        number = (
            value.get("logprob") if isinstance(value, dict) else getattr(value, "logprob", value)
        )
        yield number_of(number)


def number_of(value: Any) -> float:
    """A log-prob as JSON has it; null is NaN. A ValueError for text, true, and whole numbers."""
    if isinstance(value, str | bool) or (isinstance(value, int) and value != 0):
        raise ValueError(f"{str(value)[:60]} stands for a log-prob, which is a fraction")
    return math.nan if value is None else float(value)


def _refuse_others(prompt_logprobs: Any, tokens: Sequence[int], who: str) -> None:
    """An answer about other tokens before those that are read: another request's."""
    if hasattr(prompt_logprobs, "start_indices"):
        return
    for position, (entry, token) in enumerate(zip(prompt_logprobs[1:], tokens[1:]), 1):
        if entry and token not in entry and str(token) not in entry:
            raise UserError(
                f"{who}: the scores of token {position} do not hold its own id {token}: {OTHERS}"
            )


def _refuse_broken(ids: Tensor, logps: Tensor, start: int, who: str) -> None:
    """An entry that is missing, or numbers that are no log-probs."""
    bad = logps.isnan().any(1) | (logps > 1e-3).any(1) | (ids < 0).all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        found = [round(x, 4) for x in logps[row][ids[row] >= 0].tolist()][:4]
        raise UserError(
            f"{who}: the scores of token {start + row} are no log-probs "
            f"({found or 'none came back'}): the model's output is broken there, or another mode "
            "than raw_logprobs is set. Nothing was learnt from this step; check the model and its "
            "dtype"
        )
