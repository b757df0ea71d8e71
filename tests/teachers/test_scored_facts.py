"""vLLM's prompt log-probs are read by token id (PITFALLS K5): k or k + 1 entries, None in front,
and nothing that does not fit is believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.teachers.scored_facts import parse_prompt_logprobs

TOKENS = [7, 3, 5, 3]
# of the whole vocabulary at tokens 1, 2, 3: {id: log-prob}; the token itself is the second, the
# fourth, the first
LOGPS = (
    {0: -1.0, 3: -1.5, 8: -2.0},
    {2: -0.5, 9: -1.0, 4: -3.0, 5: -4.0},
    {3: -0.1, 1: -3.0, 6: -4.0},
)


@dataclass
class Logprob:
    """As vllm.logprobs.Logprob."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Flat:
    """As vllm.logprobs.FlatLogprobs."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.start_indices)


def entries(k: int) -> list[dict[int, float] | None]:
    """The token first, then the k most probable: a dict, so the token is not repeated."""
    rows: list[dict[int, float] | None] = [None]
    for token, scores in zip(TOKENS[1:], LOGPS):
        top = sorted(scores, key=lambda i: -scores[i])[:k]
        rows.append({i: scores[i] for i in (token, *top)})
    return rows


def objects(rows: list[dict[int, float] | None]) -> Any:
    return [row and {i: Logprob(x) for i, x in row.items()} for row in rows]


def json(rows: list[dict[int, float] | None]) -> Any:
    return [
        row and {str(i): {"logprob": x, "rank": 1, "decoded_token": "?"} for i, x in row.items()}
        for row in rows
    ]


def flat(rows: list[dict[int, float] | None]) -> Any:
    """The token is in front, and once more where it is among the k."""
    made = Flat()
    for token, row in zip(TOKENS, rows):
        made.start_indices.append(len(made.token_ids))
        if row:
            k = max(map(len, filter(None, rows))) - 1
            top = sorted(row, key=lambda i: -row[i])[:k]
            made.token_ids += [token, *top]
            made.logprobs += [row[token], *(row[i] for i in top)]
        made.end_indices.append(len(made.token_ids))
    return made


FORMS = pytest.mark.parametrize("form", [objects, json, flat])


@FORMS
def test_tokens_and_top_k_are_found_by_id(form: Callable[..., Any]) -> None:
    scored = parse_prompt_logprobs(form(entries(2)), TOKENS, 1, 2, "r")
    assert scored.logp.tolist() == pytest.approx([-1.5, -4.0, -0.1])
    # the token counts among the k where it belongs, and only there
    assert scored.top_ids.tolist() == [[0, 3], [2, 9], [3, 1]]
    torch.testing.assert_close(
        scored.top_logp, torch.tensor([[-1.0, -1.5], [-0.5, -1.0], [-0.1, -3.0]])
    )


@FORMS
def test_the_response_alone_is_read(form: Callable[..., Any]) -> None:
    scored = parse_prompt_logprobs(form(entries(1)), TOKENS, 2, 1, "r")
    assert scored.logp.tolist() == pytest.approx([-4.0, -0.1])
    assert scored.top_ids.tolist() == [[2], [3]]


@FORMS
def test_k_0_reads_the_tokens(form: Callable[..., Any]) -> None:
    scored = parse_prompt_logprobs(form(entries(0)), TOKENS, 1, 0, "r")
    assert scored.logp.tolist() == pytest.approx([-1.5, -4.0, -0.1]) and scored.top_ids.shape == (
        3,
        0,
    )


@FORMS
def test_more_than_was_asked_for_is_cut(form: Callable[..., Any]) -> None:
    """Two methods may share a request."""
    scored = parse_prompt_logprobs(form(entries(3)), TOKENS, 1, 1, "r")
    assert scored.top_ids.tolist() == [[0], [2], [3]]


def test_the_order_of_columns_says_nothing() -> None:
    rows = [row and dict(reversed(row.items())) for row in entries(3)]
    assert parse_prompt_logprobs(json(rows), TOKENS, 1, 2, "r").top_ids.tolist() == [
        [0, 3],
        [2, 9],
        [3, 1],
    ]


def test_a_token_that_ties_with_the_last_of_the_k() -> None:
    rows = [None, {3: -1.0, 0: -0.5, 8: -1.0}]
    scored = parse_prompt_logprobs(objects(rows), TOKENS[:2], 1, 2, "r")
    assert scored.logp.tolist() == [-1.0] and scored.top_logp.tolist() == [[-0.5, -1.0]]


def test_minus_infinity_in_json() -> None:
    rows = [None, {3: -9999.0, 0: -0.5}]
    assert parse_prompt_logprobs(json(rows), TOKENS[:2], 1, 1, "r").logp.tolist() == [-math.inf]


def test_an_empty_response() -> None:
    scored = parse_prompt_logprobs(json([None, {3: -1.0}]), TOKENS[:2], 2, 4, "r")
    assert scored.logp.shape == (0,) and len(scored.top_ids) == 0


@pytest.mark.parametrize(
    ("rows", "k", "says"),
    [
        (entries(2)[:-1], 2, "log-probs of 4 tokens were asked for, and 3 came back"),
        ([None, *entries(2)[2:], {3: -1.0}], 2, "do not hold its own id 3"),  # shifted by one
        (entries(2), 3, "3 log-probs per token were asked for, and 2 came back"),
        ([None, {3: math.nan, 1: -1.0}, *entries(2)[2:]], 2, "token 1 are no log-probs"),
        # logits
        ([None, {3: 12.5, 1: -1.0}, *entries(2)[2:]], 2, "another mode than raw_logprobs"),
        ([None, None, *entries(2)[2:]], 2, "none came back"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(rows: list[Any], k: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        parse_prompt_logprobs(json(rows), TOKENS, 1, k, "teacher M, rollout 3/p/0")
    assert "rollout 3/p/0" in str(error.value)


def test_no_answer_and_no_prompt() -> None:
    with pytest.raises(UserError, match="none came back"):
        parse_prompt_logprobs(None, TOKENS, 1, 2, "r")
    with pytest.raises(UserError, match="nothing precedes the first token"):
        parse_prompt_logprobs(json(entries(2)), TOKENS, 0, 2, "r")
