"""What `opdkit serve-teacher` answers: a local model that scores tokens exactly as it would in the
training process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from opdkit.models.identity import SHORT, tokenizer_digest
from opdkit.models.layout import Layout, batch_tokens
from opdkit.models.limits import context_limit
from opdkit.models.tokenizers import real_vocabulary
from opdkit.objective.facts import LogpAtFact, LogpFact, TopFact
from opdkit.teachers import protocol
from opdkit.teachers.base import answers
from opdkit.teachers.gate import BadRequest, Room
from opdkit.teachers.local import LocalModel
from opdkit.teachers.scored_facts import JSON_FLOOR
from opdkit.types import Rollout

T = TypeVar("T")

LARGEST_TABLE = 1 << 30  # bytes of all that one request asks for, before it is sent
CELL = 16  # bytes of one number in it: itself, and as much on the way
MOST_ENTRIES = 1 << 21  # log-probs of one /v1/completions answer
ENTRY = 1 << 10  # bytes of each, as Python holds it and as text
VOCABULARY = 1 << 9  # bytes of each token of /tokenizer, as Python holds it and as text
ANSWERS = 2 << 30  # bytes of all answers that are being made or sent
LONGEST = 600.0  # seconds in which a request is scored, others before it included


@dataclass
class Service:
    """One model, scored by one thread; each method answers one kind of request."""

    local: LocalModel
    tokenizer: Any
    name: str
    worker: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="score")
    )
    # prompts for /v1/completions
    waiting: list[tuple[Rollout, int, Future[Any]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    room: Room = field(default_factory=lambda: Room(ANSWERS))  # of who has called, until released

    def __post_init__(self) -> None:
        model = self.local.model
        self.fingerprint = protocol.model_digest(model)
        self.limit = context_limit(model.config)
        self.device = next(model.parameters()).device
        self.budget = self.local.micro_batch_tokens or batch_tokens(self.device)
        self.rows = self.local.head.size(torch.zeros(0))
        assert self.local.head.weight is not None
        self.columns = self.local.head.weight.shape[1]
        self.ids = min(self.rows, model.get_input_embeddings().weight.shape[0])
        known = real_vocabulary(self.tokenizer)
        # rows that only pad the head are no tokens
        self.scored = self.local.cut(known if self.rows > known else None)

    # -------------------------------------------------------------------------------------- answers

    def models(self) -> dict[str, Any]:
        about = {
            "fingerprint": self.fingerprint,
            "tokenizer": tokenizer_digest(self.tokenizer)[:SHORT],
            "rows": self.rows,
            "columns": self.columns,
            "micro_batch_tokens": self.budget,
        }
        card = {
            "id": self.name,
            "object": "model",
            "owned_by": "opdkit",
            "max_model_len": self.limit,
            "opdkit": about,
        }
        return {"object": "list", "data": [card]}

    def vocabulary(self) -> dict[str, Any]:
        self.room.take(VOCABULARY * len(self.tokenizer))
        return {"name": self.name, "vocab": self.tokenizer.get_vocab()}

    def head(self) -> bytes:
        """Of the whole matrix, as the client multiplies with it."""
        self.room.take(8 * self.rows * (self.columns + 1))
        return protocol.pack_head(self.local.head)

    def score(self, body: bytes) -> bytes:
        """Facts of rollouts, or hidden states where none is asked for; see `scoring`."""
        try:
            layout, positions, wanted, ids, vocab = protocol.unpack_request(body, self.rows)
        except (ValueError, RecursionError) as error:  # RecursionError: JSON of a thousand brackets
            raise BadRequest(f"the body is no request for scores: {error}") from error
        cells = (
            len(layout.rollouts)
            * layout.width
            * (1 + sum(fact.numbers for fact in (*wanted, *ids)))
        )
        if cells * CELL > LARGEST_TABLE:
            raise BadRequest(
                f"{len(layout.rollouts)} rollouts, the longest of {layout.width} tokens, with all "
                f"that is asked of them would fill {cells * CELL / 2**30:.1f} GiB: ask about fewer "
                "of them, or for a smaller k, at once"
            )
        for rollout in layout.rollouts:
            self.readable(
                rollout.prompt + rollout.tokens,
                f"rollout {protocol.shown(rollout.id)}",
                0,
                self.ids,
            )
        self.room.take(cells * CELL)
        positions, local = positions.to(self.device), self.local.cut(vocab)

        def run() -> dict[str, Tensor]:
            if not wanted:
                source = local.source(layout, positions)
                return {"hidden": source.hidden[source.index[positions]]}
            made = answers(
                local, wanted, layout, positions, {f: v.to(self.device) for f, v in ids.items()}
            )
            return {str(i): made[fact] for i, fact in enumerate(wanted)}

        return protocol.pack_answer(_in_time([self.worker.submit(run)])[0], body)

    def completions(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The OpenAI form with vLLM's prompt_logprobs: prompts of token ids are scored, nothing is
        written.
        """
        prompts, k = self._asked(given)
        self.room.take(ENTRY * sum(map(len, prompts)) * max(k, 1))
        futures: list[Future[Any]] = [Future() for _ in prompts]
        with self.lock:
            for prompt, future in zip(prompts, futures):
                self.waiting.append(
                    (
                        Rollout(
                            "prompt", prompt[:1], prompt[1:], [True] * (len(prompt) - 1), [], [], ""
                        ),
                        k,
                        future,
                    )
                )
        self.worker.submit(self._drain)
        choices = [
            {
                "index": i,
                "text": "",
                "logprobs": None,
                "finish_reason": "length",
                "prompt_logprobs": entries,
            }
            for i, entries in enumerate(_in_time(futures))
        ]
        usage = {
            "prompt_tokens": sum(map(len, prompts)),
            "completion_tokens": 0,
            "total_tokens": sum(map(len, prompts)),
        }
        return {
            "id": "cmpl-opdkit",
            "object": "text_completion",
            "model": self.name,
            "choices": choices,
            "usage": usage,
        }

    def _asked(self, given: Mapping[str, Any]) -> tuple[list[list[int]], int]:
        """Prompts and the number of log-probs per token."""
        if given.get("model", self.name) != self.name:
            raise BadRequest(
                f"The model `{given['model']}` does not exist: this server has {self.name}", 404
            )
        k, prompts = given.get("prompt_logprobs"), given.get("prompt")
        if type(k) is not int or not 0 <= k <= self.rows:
            raise BadRequest(
                "this server scores prompts: give prompt_logprobs, a whole number from 0 to "
                f"{self.rows}"
            )
        spare, n = given.get("max_tokens", 16), given.get("n", 1)
        if (
            type(spare) is not int
            or spare not in (0, 1)
            or given.get("stream")
            or given.get("echo")
            or type(n) is not int
            or n != 1
        ):
            raise BadRequest(
                "this server writes nothing: max_tokens must be 0 or 1, n 1, and stream and echo "
                "off"
            )
        if isinstance(prompts, list) and prompts and all(isinstance(t, int) for t in prompts):
            prompts = [prompts]
        if (
            not isinstance(prompts, list)
            or not prompts
            or not all(isinstance(p, list) and p for p in prompts)
        ):
            raise BadRequest(
                "prompt must be token ids, or a list of such lists: text would be tokenised anew, "
                "and not into the same tokens"
            )
        if (entries := sum(map(len, prompts)) * max(k, 1)) > MOST_ENTRIES:
            raise BadRequest(
                f"{sum(map(len, prompts))} tokens with prompt_logprobs={k} are {entries} "
                f"log-probs, and an answer holds at most {MOST_ENTRIES}: ask about fewer tokens, "
                "or for fewer log-probs, at once"
            )
        for prompt in prompts:
            self.readable(
                prompt, "the prompt", spare, min(self.ids, self.scored.head.size(torch.zeros(0)))
            )
        return prompts, k

    def readable(self, tokens: Sequence[Any], who: str, spare: int, ids: int) -> None:
        if wrong := [t for t in tokens if type(t) is not int or not 0 <= t < ids]:
            raise BadRequest(
                f"Token id {protocol.shown(wrong[0])} is out of vocabulary: {who} may hold 0 to "
                f"{ids - 1}"
            )
        if self.limit is not None and len(tokens) + spare > self.limit:
            raise BadRequest(
                f"This model's maximum context length is {self.limit} tokens. However, {who} has "
                f"{len(tokens)}."
            )

    def _drain(self) -> None:
        """Scores every waiting prompt, as many in one pass as its tokens allow."""
        with self.lock:
            waiting, self.waiting = self.waiting, []
        jobs = [job for job in waiting if job[2].set_running_or_notify_cancel()]
        try:
            for part in _together([(len(r.tokens), k) for r, k, _ in jobs]):
                for job, entries in zip(
                    jobs[part],
                    self._entries([r for r, _, _ in jobs[part]], [k for _, k, _ in jobs[part]]),
                ):
                    job[2].set_result(entries)
        except Exception as error:
            for _, _, future in jobs:
                if not future.done():
                    future.set_exception(error)

    def _entries(self, rollouts: list[Rollout], ks: list[int]) -> list[list[dict[str, Any] | None]]:
        """Per prompt and token: {id: {logprob, rank, decoded_token}} of the k most probable ids and
        the token's own.
        """
        layout, deepest = Layout(rollouts, max(len(r.tokens) for r in rollouts)), max(ks)
        at = [torch.arange(len(r.tokens)) + b * layout.width for b, r in enumerate(rollouts)]
        positions = torch.cat(at).to(self.device)
        own, top = LogpFact("m"), TopFact("m", deepest)
        made: Any = {}
        if len(positions):
            made = answers(
                self.scored,
                [own, top, LogpAtFact("m", "m", deepest)] if deepest else [own],
                layout,
                positions,
                {},
            )
        logps, out, first = made.get(own, torch.zeros(0)).tolist(), [], 0
        ids = made[top].tolist() if deepest and made else []
        values = made[LogpAtFact("m", "m", deepest)].tolist() if deepest and made else []
        for rollout, k in zip(rollouts, ks):
            entries: list[dict[str, Any] | None] = [None]
            for n, token in enumerate(rollout.tokens, first):
                best = list(zip(ids[n][:k], values[n][:k])) if k else []
                entry = {str(i): self._entry(i, v, rank) for rank, (i, v) in enumerate(best, 1)}
                entry.setdefault(str(token), self._entry(token, logps[n], None))
                entries.append(entry)
            out.append(entries)
            first += len(rollout.tokens)
        return out

    def _entry(self, id: int, logp: float, rank: int | None) -> dict[str, Any]:
        return {
            "logprob": max(logp, JSON_FLOOR),
            "rank": rank,
            "decoded_token": self.tokenizer.decode([id]),
        }


def _in_time(futures: Sequence[Future[T]]) -> list[T]:
    """Their results; what has not begun by then is not begun."""
    end = time.monotonic() + LONGEST
    try:
        return [future.result(max(0.0, end - time.monotonic())) for future in futures]
    except TimeoutError:
        for future in futures:
            future.cancel()
        raise BadRequest(f"it was not scored within {LONGEST:g} s: ask about less", 503) from None


def _together(sizes: Sequence[tuple[int, int]]) -> Iterator[slice]:
    """Prompts, by their tokens and log-probs per token, in turns: each is as long and as deep as
    its longest and deepest, in a table.
    """
    start, longest, deepest = 0, 1, 1
    for at, (tokens, k) in enumerate(sizes):
        longest, deepest = max(longest, tokens), max(deepest, k)
        if at > start and (at + 1 - start) * longest * deepest > MOST_ENTRIES:
            yield slice(start, at)
            start, longest, deepest = at, max(tokens, 1), max(k, 1)
    if start < len(sizes):
        yield slice(start, len(sizes))
