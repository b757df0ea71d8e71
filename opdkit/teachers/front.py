"""What `opdkit serve-teacher` is asked about one of its models, and what it says: requests are
checked here, before any model reads them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opdkit.models.layout import Layout
from opdkit.objective.facts import Fact, TopFact
from opdkit.teachers import protocol
from opdkit.teachers.gate import BadRequest, Room

LARGEST_TABLE = 1 << 30  # bytes of all that one request asks for, before it is sent
CELL = 16  # bytes of one number in it: itself, and as much on the way
MOST_ENTRIES = 1 << 21  # log-probs of one /v1/completions answer
ENTRY = 1 << 10  # bytes of each, as Python holds it and as text
VOCABULARY = 1 << 9  # bytes of each token of /tokenizer, as Python holds it and as text
ANSWERS = 2 << 30  # bytes of all answers that are being made or sent
LONGEST = 600.0  # seconds in which a request is scored, others before it included


@dataclass(frozen=True)
class About:
    """What is to be known of a model to check a request to it."""

    name: str
    fingerprint: str
    tokenizer: str  # its digest
    rows: int  # of the head
    columns: int
    ids: int  # that it can read: 0 to ids - 1
    scored: int  # ids whose log-probs it says; rows that only pad the head are none
    budget: int  # padded tokens of a pass
    limit: int | None = None  # tokens that it reads
    shared: bool = False  # whether it waits for its turn among other models

    def card(self) -> dict[str, Any]:
        about = {
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "rows": self.rows,
            "columns": self.columns,
            "micro_batch_tokens": self.budget,
            "shared": self.shared,
        }
        return {
            "id": self.name,
            "object": "model",
            "owned_by": "opdkit",
            "max_model_len": self.limit,
            "opdkit": about,
        }


@dataclass(frozen=True)
class Asked:
    """A request for scores, read and checked."""

    layout: Layout
    positions: Tensor  # [N] flat
    wanted: Collection[Fact]  # none: hidden states
    ids: Mapping[TopFact, Tensor]  # [N, k] other models' ids
    vocab: int | None  # rows of the head to keep


class Front(ABC):
    """One model as those who ask see it; each method answers one kind of request."""

    about: About
    tokenizer: Any
    room: Room  # of who has called, until released

    @property
    def fingerprint(self) -> str:
        return self.about.fingerprint

    def vocabulary(self) -> dict[str, Any]:
        self.room.take(VOCABULARY * len(self.tokenizer))
        return {"name": self.about.name, "vocab": self.tokenizer.get_vocab()}

    def head(self) -> bytes:
        """Of the whole matrix, as the client multiplies with it."""
        self.room.take(8 * self.about.rows * (self.about.columns + 1))
        return self.packed_head()

    def score(self, body: bytes) -> bytes:
        """Facts of rollouts, or hidden states where none is asked for."""
        return self.scored(body, self.checked(body))

    @abstractmethod
    def packed_head(self) -> bytes: ...

    @abstractmethod
    def scored(self, body: bytes, asked: Asked) -> bytes:
        """The answer to a request, which `asked` is."""

    @abstractmethod
    def entries(self, prompts: Sequence[list[int]], k: int) -> list[Any]:
        """Of each prompt, per token: {id: {logprob, rank, decoded_token}} of the k most probable
        ids and the token's own.
        """

    def checked(self, body: bytes) -> Asked:
        """A request for scores; room is taken for what it asks for."""
        try:
            asked = Asked(*protocol.unpack_request(body, self.about.rows))
        except (ValueError, RecursionError) as error:  # RecursionError: JSON of a thousand brackets
            raise BadRequest(f"the body is no request for scores: {error}") from error
        layout = asked.layout
        numbers = 1 + sum(fact.numbers for fact in (*asked.wanted, *asked.ids))
        cells = len(layout.rollouts) * layout.width * numbers
        if cells * CELL > LARGEST_TABLE:
            raise BadRequest(
                f"{len(layout.rollouts)} rollouts, the longest of {layout.width} tokens, with all "
                f"that is asked of them would fill {cells * CELL / 2**30:.1f} GiB: ask about fewer "
                "of them, or for a smaller k, at once"
            )
        for rollout in layout.rollouts:
            who = f"rollout {protocol.shown(rollout.id)}"
            self.readable(rollout.prompt + rollout.tokens, who, 0, self.about.ids)
        self.room.take(cells * CELL)
        return asked

    def completions(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The OpenAI form with vLLM's prompt_logprobs: prompts of token ids are scored, nothing is
        written.
        """
        prompts, k = self._asked(given)
        self.room.take(ENTRY * sum(map(len, prompts)) * max(k, 1))
        choices = [
            {
                "index": i,
                "text": "",
                "logprobs": None,
                "finish_reason": "length",
                "prompt_logprobs": entries,
            }
            for i, entries in enumerate(self.entries(prompts, k))
        ]
        usage = {
            "prompt_tokens": sum(map(len, prompts)),
            "completion_tokens": 0,
            "total_tokens": sum(map(len, prompts)),
        }
        return {
            "id": "cmpl-opdkit",
            "object": "text_completion",
            "model": self.about.name,
            "choices": choices,
            "usage": usage,
        }

    def _asked(self, given: Mapping[str, Any]) -> tuple[list[list[int]], int]:
        """Prompts and the number of log-probs per token."""
        if given.get("model", self.about.name) != self.about.name:
            raise BadRequest(
                f"The model `{given['model']}` does not exist: this server has {self.about.name}",
                404,
            )
        k, prompts = given.get("prompt_logprobs"), given.get("prompt")
        if type(k) is not int or not 0 <= k <= self.about.rows:
            raise BadRequest(
                "this server scores prompts: give prompt_logprobs, a whole number from 0 to "
                f"{self.about.rows}"
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
            self.readable(prompt, "the prompt", spare, min(self.about.ids, self.about.scored))
        return prompts, k

    def readable(self, tokens: Sequence[Any], who: str, spare: int, ids: int) -> None:
        if wrong := [t for t in tokens if type(t) is not int or not 0 <= t < ids]:
            raise BadRequest(
                f"Token id {protocol.shown(wrong[0])} is out of vocabulary: {who} may hold 0 to "
                f"{ids - 1}"
            )
        if self.about.limit is not None and len(tokens) + spare > self.about.limit:
            raise BadRequest(
                f"This model's maximum context length is {self.about.limit} tokens. However, {who} "
                f"has {len(tokens)}."
            )
