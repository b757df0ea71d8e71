"""How vLLM and SGLang are asked over HTTP for the log-probs of given tokens, and how their answers
read.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import Endpoint, Refused
from opdkit.teachers.scored_facts import PromptScores, parse_prompt_logprobs

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

    def _completions(self, endpoint: Endpoint, model: str, ask: Ask, k: int) -> Any:
        body = {
            "model": model,
            "prompt": ask.tokens,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": k,
        }
        answer = post(endpoint, "/v1/completions", body, ask, k)
        same_model(answer.get("model"), model, ask.who)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise UserError(
                f"{ask.who}: the server's answer has no single completion in it, but "
                f"{str(choices)[:200]}"
            )
        return choices[0].get("prompt_logprobs")

    def scores(self, endpoint: Endpoint, model: str, ask: Ask, k: int) -> PromptScores:
        return parse_prompt_logprobs(
            self._completions(endpoint, model, ask, k), ask.tokens, ask.start, k, ask.who
        )

    def at(self, endpoint: Endpoint, model: str, ask: Ask, ids: Tensor) -> Tensor:
        """[n, k]: log-probs at token ids [n, k] of the n tokens asked about."""
        wanted = {"prompt_logprob_token_ids": ids.tolist(), "prompt_logprob_start": ask.start - 1}
        body = {
            "model": model,
            "token_ids": ask.tokens,
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, **wanted},
        }
        answer = post(endpoint, "/inference/v1/generate", body, ask, ids.shape[1])
        same_model(answer.get("model"), model, ask.who)
        try:
            table = np.load(
                io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])), allow_pickle=False
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{ask.who}: no log-probs at the ids that were asked about came back "
                f"({type(error).__name__}: {error})"
            ) from error
        return whole(torch.from_numpy(np.ascontiguousarray(table, dtype=np.float32)), ids, ask)

    def texts(self, endpoint: Endpoint, model: str, ask: Ask) -> dict[int, str]:
        found: dict[int, str] = {}
        for entry in (self._completions(endpoint, model, ask, 1) or [])[ask.start :]:
            for id, value in (entry or {}).items():
                if isinstance(value, dict) and isinstance(value.get("decoded_token"), str):
                    found[int(id)] = value["decoded_token"]
        return found


class SGLang:
    """`/generate` with return_logprob.

    Ids at which log-probs are read are one list per request, so these are asked about in spans.
    """

    kind = "SGLang"

    def _generate(self, endpoint: Endpoint, ask: Ask, **wanted: Any) -> dict[str, Any]:
        sampling = {"max_new_tokens": 0, "temperature": 0}
        body = {
            "input_ids": ask.tokens,
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": ask.start - 1,
            **wanted,
        }
        meta = post(endpoint, "/generate", body, ask).get("meta_info")
        return meta if isinstance(meta, dict) else {}

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
        meta = self._generate(endpoint, ask, top_logprobs_num=k)
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
        return parse_prompt_logprobs(
            [None] * ask.start + entries, ask.tokens, ask.start, k, ask.who
        )

    def at(self, endpoint: Endpoint, model: str, ask: Ask, ids: Tensor) -> Tensor:
        """[n, k]: log-probs at token ids [n, k] of the n tokens asked about."""
        parts = []
        for first in range(0, len(ids), SPAN):
            part = ids[first : first + SPAN]
            span = Ask(ask.who, ask.tokens[: ask.start + first + len(part)], ask.start + first)
            meta = self._generate(endpoint, span, token_ids_logprob=part.unique().tolist())
            rows = self._rows(meta, "input_token_ids_logprobs", span)
            known = [{entry[1]: entry[0] for entry in row or []} for row in rows]
            parts.append([[of.get(i) for i in wanted] for of, wanted in zip(known, part.tolist())])
        numbers = [
            [float("nan") if x is None else x for x in row] for part in parts for row in part
        ]
        return whole(torch.tensor(numbers, dtype=torch.float32), ids, ask)

    def texts(self, endpoint: Endpoint, model: str, ask: Ask) -> dict[int, str]:
        meta = self._generate(endpoint, ask, return_text_in_logprobs=True)
        return {
            row[1]: row[2]
            for row in self._rows(meta, "input_token_logprobs", ask)
            if len(row) > 2 and isinstance(row[2], str)
        }


# ------------------------------------------------------------------------------------------- checks


def post(
    endpoint: Endpoint, path: str, body: dict[str, Any], ask: Ask, k: int = 0
) -> dict[str, Any]:
    """A server's answer; what goes wrong is told with the rollout that it was asked about."""
    try:
        return endpoint.post(path, body)
    except Refused as refused:
        raise UserError(f"{ask.who}: {advise(refused, k)}") from refused
    except UserError as error:
        raise UserError(f"{ask.who}: {error}. Nothing was learnt from this step") from error


def same_model(said: Any, model: str, who: str) -> None:
    """A server that was started again may serve something else."""
    if said is not None and said != model:
        raise UserError(
            f"{who}: the answer is the model {said!r}'s, not {model!r}'s: the server was started "
            "again with another. Nothing was learnt from this step; start the right one and "
            "continue with --resume"
        )


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
