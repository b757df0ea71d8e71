"""A local model behind `opdkit serve-teacher`: it scores tokens exactly as it would in the training
process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from opdkit.models.identity import SHORT, tokenizer_digest
from opdkit.models.layout import Layout, batch_tokens
from opdkit.models.limits import context_limit
from opdkit.models.tokenizers import real_vocabulary
from opdkit.objective.facts import LogpAtFact, LogpFact, TopFact
from opdkit.teachers import front, protocol
from opdkit.teachers.base import answers
from opdkit.teachers.front import About, Asked, Front
from opdkit.teachers.gate import BadRequest, Room
from opdkit.teachers.local import LocalModel
from opdkit.teachers.scored_facts import JSON_FLOOR
from opdkit.types import Rollout

T = TypeVar("T")


class Service(Front):
    """One model, scored by one thread."""

    def __init__(self, local: LocalModel, tokenizer: Any, name: str, room: Room | None = None):
        self.local, self.tokenizer = local, tokenizer
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="score")
        # prompts for /v1/completions
        self.waiting: list[tuple[Rollout, int, Future[Any]]] = []
        self.lock = threading.Lock()
        self.room = room or Room(front.ANSWERS)
        model, rows = local.model, local.head.size(torch.zeros(0))
        self.device = next(model.parameters()).device
        known = real_vocabulary(tokenizer)
        self.kept = local.cut(known if rows > known else None)
        assert local.head.weight is not None
        self.about = About(
            name,
            protocol.model_digest(model),
            tokenizer_digest(tokenizer)[:SHORT],
            rows,
            local.head.weight.shape[1],
            min(rows, model.get_input_embeddings().weight.shape[0]),
            self.kept.head.size(torch.zeros(0)),
            local.micro_batch_tokens or batch_tokens(self.device),
            context_limit(model.config),
        )

    # -------------------------------------------------------------------------------------- answers

    def packed_head(self) -> bytes:
        return protocol.pack_head(self.local.head)

    def scored(self, body: bytes, asked: Asked) -> bytes:
        positions, local = asked.positions.to(self.device), self.local.cut(asked.vocab)

        def run() -> dict[str, Tensor]:
            if not asked.wanted:
                source = local.source(asked.layout, positions)
                return {"hidden": source.hidden[source.index[positions]]}
            ids = {f: v.to(self.device) for f, v in asked.ids.items()}
            made = answers(local, asked.wanted, asked.layout, positions, ids)
            return {str(i): made[fact] for i, fact in enumerate(asked.wanted)}

        return protocol.pack_answer(_in_time([self.worker.submit(run)])[0], body)

    def entries(self, prompts: Sequence[list[int]], k: int) -> list[Any]:
        futures: list[Future[Any]] = [Future() for _ in prompts]
        with self.lock:
            for prompt, future in zip(prompts, futures):
                trained = [True] * (len(prompt) - 1)
                rollout = Rollout("prompt", prompt[:1], prompt[1:], trained, [], [], "")
                self.waiting.append((rollout, k, future))
        self.worker.submit(self._drain)
        return _in_time(futures)

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
                self.kept,
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
    end = time.monotonic() + front.LONGEST
    try:
        return [future.result(max(0.0, end - time.monotonic())) for future in futures]
    except TimeoutError:
        for future in futures:
            future.cancel()
        raise BadRequest(
            f"it was not scored within {front.LONGEST:g} s: ask about less", 503
        ) from None


def _together(sizes: Sequence[tuple[int, int]]) -> Iterator[slice]:
    """Prompts, by their tokens and log-probs per token, in turns: each is as long and as deep as
    its longest and deepest, in a table.
    """
    start, longest, deepest = 0, 1, 1
    for at, (tokens, k) in enumerate(sizes):
        longest, deepest = max(longest, tokens), max(deepest, k)
        if at > start and (at + 1 - start) * longest * deepest > front.MOST_ENTRIES:
            yield slice(start, at)
            start, longest, deepest = at, max(tokens, 1), max(k, 1)
    if start < len(sizes):
        yield slice(start, len(sizes))
