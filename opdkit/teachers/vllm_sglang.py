"""How vLLM and SGLang are asked over HTTP for the log-probs of given tokens, and how their answers
read.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import Endpoint, Refused
from opdkit.models.engines.exchange import MOST, Broken, Reply, object_of, shown
from opdkit.teachers.scored_facts import PromptScores, parse_prompt_logprobs

T = TypeVar("T")

ENTRY = 1024  # bytes of JSON, at most, about one log-prob: its number, rank and token's text
WHOLE = 1.001  # what probabilities may sum to, rounding included
SPAN = 32  # tokens of one SGLang request for log-probs at ids that differ from token to token


@dataclass(frozen=True)
class Ask:
    """Tokens to be scored: tokens[start:], each given all before it."""

    who: str  # in errors
    tokens: list[int]
    start: int


class Wire(Protocol):
    """One kind of server."""

    kind: str

    def scores(self, endpoint: Endpoint, model: str, ask: Ask, k: int) -> PromptScores:
        """Log-probs of the tokens, and the k most probable ids with theirs."""
        ...

    def at(self, endpoint: Endpoint, model: str, ask: Ask, ids: Tensor) -> Tensor:
        """[n, m]: log-probs at ids [n, m]; one row per scored token."""
        ...

    def texts(self, endpoint: Endpoint, model: str, ask: Ask) -> dict[int, str]:
        """The server's own text of each scored token, where it says."""
        ...


class Vllm:
    """`/v1/completions` with prompt_logprobs; `/inference/v1/generate` for log-probs at given ids
    (vLLM 0.32 or newer on a GPU).
    """

    kind = "vLLM"

    def _completions(
        self, endpoint: Endpoint, model: str, ask: Ask, k: int, read: Callable[[Any, Ask], T]
    ) -> T:
        """What `read` makes of the prompt_logprobs that come back."""
        body = {
            "model": model,
            "prompt": ask.tokens,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": k,
        }

        def choice(answer: dict[str, Any], ask: Ask) -> T:
            same_model(answer.get("model"), model, ask.who)
            choices = answer.get("choices")
            if (
                not isinstance(choices, list)
                or len(choices) != 1
                or not isinstance(choices[0], dict)
            ):
                raise Broken(f"no single completion is in it, but {shown(choices)}")
            return read(choices[0].get("prompt_logprobs"), ask)

        return post(endpoint, "/v1/completions", body, ask, choice, k, len(ask.tokens) * (k + 1))

    def scores(self, endpoint: Endpoint, model: str, ask: Ask, k: int) -> PromptScores:
        def read(entries: Any, ask: Ask) -> PromptScores:
            return softmax(parse_prompt_logprobs(entries, ask.tokens, ask.start, k, ask.who), ask)

        return self._completions(endpoint, model, ask, k, read)

    def at(self, endpoint: Endpoint, model: str, ask: Ask, ids: Tensor) -> Tensor:
        """[n, k]: log-probs at token ids [n, k] of the n tokens asked about."""
        wanted = {"prompt_logprob_token_ids": ids.tolist(), "prompt_logprob_start": ask.start - 1}
        body = {
            "model": model,
            "token_ids": ask.tokens,
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, **wanted},
        }

        def read(answer: dict[str, Any], ask: Ask) -> Tensor:
            same_model(answer.get("model"), model, ask.who)
            return whole(table_of(answer.get("prompt_token_id_logprobs"), ids), ids, ask)

        path, most = "/inference/v1/generate", len(ask.tokens) * (ids.shape[1] + 1)
        return post(endpoint, path, body, ask, read, ids.shape[1], most)

    def texts(self, endpoint: Endpoint, model: str, ask: Ask) -> dict[int, str]:
        def read(entries: Any, ask: Ask) -> dict[int, str]:
            return {
                int(id): value["decoded_token"]
                for entry in (entries or [])[ask.start :]
                for id, value in (entry or {}).items()
                if isinstance(value, dict) and isinstance(value.get("decoded_token"), str)
            }

        return self._completions(endpoint, model, ask, 1, read)


def table_of(text: Any, ids: Tensor) -> Tensor:
    """[n, m] float32: the numbers at ids [n, m] that vLLM writes as a base64 array."""
    if not isinstance(text, str):
        raise Broken("no log-probs at the ids that were asked about are in it")
    data = base64.b64decode(text, validate=True)
    # numpy makes room for what an array's first line says before it sees what follows
    if not 0 < len(data) - 4 * ids.numel() < 4096:
        raise Broken(f"{ids.numel()} log-probs were asked for, and {len(data)} bytes are in it")
    table = np.load(io.BytesIO(data), allow_pickle=False)
    if table.dtype != np.float32:
        raise Broken(f"its log-probs are {table.dtype}, and not float32")
    return torch.from_numpy(np.ascontiguousarray(table))


class SGLang:
    """`/generate` with return_logprob.

    Ids at which log-probs are read are one list per request, so these are asked about in spans.
    """

    kind = "SGLang"

    def _generate(
        self,
        endpoint: Endpoint,
        ask: Ask,
        read: Callable[[dict[str, Any], Ask], T],
        numbers: int,
        **wanted: Any,
    ) -> T:
        """What `read` makes of the numbers that come back, `numbers` per token."""
        sampling = {"max_new_tokens": 0, "temperature": 0}
        body = {
            "input_ids": ask.tokens,
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": ask.start - 1,
            **wanted,
        }

        def meta(answer: dict[str, Any], ask: Ask) -> T:
            found = answer.get("meta_info")
            return read(found if isinstance(found, dict) else {}, ask)

        return post(endpoint, "/generate", body, ask, meta, numbers, len(ask.tokens) * numbers)

    def _rows(self, meta: dict[str, Any], name: str, ask: Ask) -> list[Any]:
        """The entries of the scored tokens; the first of the list stands for the token before them
        and is null.
        """
        rows = meta.get(name)
        expected = len(ask.tokens) - ask.start + 1
        if not isinstance(rows, list) or len(rows) != expected:
            got = len(rows) if isinstance(rows, list) else "none"
            raise UserError(
                f"{ask.who}: {expected} entries of {name} were expected and {got} came back, so "
                "none can be assigned to its token"
            )
        return rows[1:]

    def scores(self, endpoint: Endpoint, model: str, ask: Ask, k: int) -> PromptScores:
        def read(meta: dict[str, Any], ask: Ask) -> PromptScores:
            own = self._rows(meta, "input_token_logprobs", ask)
            top = self._rows(meta, "input_top_logprobs", ask) if k else [[]] * len(own)
            entries = []
            for token, one, most in zip(ask.tokens[ask.start :], own, top):
                itself = one[1] in (token, 0)  # SGLang writes 0 for the last id of its vocabulary
                entries.append(
                    {row[1]: row[0] for row in most or []} | {token: one[0]}
                    if itself
                    else {one[1]: one[0]}
                )
            rows = [None] * ask.start + entries
            return softmax(parse_prompt_logprobs(rows, ask.tokens, ask.start, k, ask.who), ask)

        return self._generate(endpoint, ask, read, k + 1, top_logprobs_num=k)

    def at(self, endpoint: Endpoint, model: str, ask: Ask, ids: Tensor) -> Tensor:
        """[n, k]: log-probs at token ids [n, k] of the n tokens asked about."""
        parts = []
        for first in range(0, len(ids), SPAN):
            part = ids[first : first + SPAN]
            span = Ask(ask.who, ask.tokens[: ask.start + first + len(part)], ask.start + first)
            asked = part.unique().tolist()

            def read(meta: dict[str, Any], span: Ask, part: Tensor = part) -> Tensor:
                rows = self._rows(meta, "input_token_ids_logprobs", span)
                known = [{entry[1]: entry[0] for entry in row or []} for row in rows]
                numbers = [
                    [float("nan") if (x := of.get(i)) is None else x for i in wanted]
                    for of, wanted in zip(known, part.tolist())
                ]
                return whole(torch.tensor(numbers, dtype=torch.float32), part, span)

            parts.append(
                self._generate(endpoint, span, read, len(asked) + 1, token_ids_logprob=asked)
            )
        return torch.cat(parts)

    def texts(self, endpoint: Endpoint, model: str, ask: Ask) -> dict[int, str]:
        def read(meta: dict[str, Any], ask: Ask) -> dict[int, str]:
            return {
                row[1]: row[2]
                for row in self._rows(meta, "input_token_logprobs", ask)
                if len(row) > 2 and isinstance(row[2], str)
            }

        return self._generate(endpoint, ask, read, 1, return_text_in_logprobs=True)


# ------------------------------------------------------------------------------------------- checks


def post(
    endpoint: Endpoint,
    path: str,
    body: dict[str, Any],
    ask: Ask,
    read: Callable[[dict[str, Any], Ask], T],
    k: int = 0,
    numbers: int = 0,
) -> T:
    """What `read` makes of a server's answer, which may hold as many log-probs as `numbers`.

    What goes wrong is told with the rollout that it was asked about and the server that said it.
    """

    def made(reply: Reply, who: str) -> T:
        return read(object_of(reply), replace(ask, who=who))

    most = MOST + ENTRY * numbers
    return endpoint.about(ask.who, path, body, made, most, lambda refused: advise(refused, k))


def same_model(said: Any, model: str, who: str) -> None:
    """A server that was started again may serve something else."""
    if said is not None and said != model:
        raise UserError(
            f"{who}: the answer is the model {shown(repr(said))}'s, not {model!r}'s: the server "
            "was started again with another. Nothing was learnt from this step; start the right "
            "one and continue with --resume"
        )


def softmax(scored: PromptScores, ask: Ask) -> PromptScores:
    """Scores as they are, where they can be of a whole vocabulary's softmax."""
    sums = scored.top_logp.exp().sum(-1) if scored.top_logp.numel() else torch.zeros(0)
    if bool((sums > WHOLE).any()) or bool(scored.logp.isinf().any()):
        raise UserError(
            f"{ask.who}: the server returns numbers that are no log-probs of its whole vocabulary "
            f"(the most probable tokens' probabilities sum to {max(sums.tolist(), default=0.0):.3f}"
            f", the least log-prob is {float(scored.logp.min()):g}). Nothing was learnt from this "
            "step; start it without a --logprobs-mode of its own, and check the model and its dtype"
        )
    return scored


def whole(table: Tensor, ids: Tensor, ask: Ask) -> Tensor:
    """Log-probs [n, m] as they were asked for: none missing, all at most 0."""
    if table.shape != ids.shape:
        raise UserError(
            f"{ask.who}: log-probs at {list(ids.shape)} ids were asked for and {list(table.shape)} "
            "came back, so none can be assigned"
        )
    bad = table.isnan() | (table > 1e-3)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise UserError(
            f"{ask.who}: the log-prob of id {int(ids[row, column])} at token {ask.start + row} is "
            f"{table[row, column].item()}, which is none. Nothing was learnt from this step; check "
            "the model and its dtype"
        )
    return table


def advise(refused: Refused, k: int) -> str:
    """What to do about a request that a server refuses."""
    said = refused.message
    if most := re.search(r"greater than max allowed: (\d+)", said):
        return (
            f"{k} log-probs per token were asked for, and the server at {refused.url} returns at "
            f"most {most[1]}. Start it with --max-logprobs {k}, or use k={most[1]} in the method"
        )
    if "out of vocabulary" in said or "vocab" in said.lower():
        return (
            f"the server at {refused.url} does not know a token of the student: {said}. Use a "
            "teacher with the student's tokenizer"
        )
    if re.search(r"context length|max_model_len|longer than the model", said, re.IGNORECASE):
        return (
            f"the server at {refused.url} cannot read so many tokens: {said}. Nothing is cut here, "
            "as a cut context changes every score: start it with a larger --max-model-len (vLLM) "
            "or --context-length (SGLang), or lower max_completion_length"
        )
    return str(refused)
