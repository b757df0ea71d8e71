"""The client of `opdkit serve-teacher`: numbers of the server, or its hidden states and head."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import quote

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import Endpoint
from opdkit.models.engines.exchange import Reply, object_of
from opdkit.models.identity import has_digest
from opdkit.models.layout import Layout
from opdkit.models.tokenizers import same_tokenizer, usable
from opdkit.objective.facts import Fact, LogpFact, TopFact
from opdkit.objective.head import Head, Source
from opdkit.objective.supply import Tensors
from opdkit.teachers import protocol
from opdkit.teachers.base import source_of
from opdkit.teachers.client_vllm_sglang import FAMILY, probe_ids
from opdkit.teachers.front import LONGEST
from opdkit.teachers.scored_facts import asked_by_parts
from opdkit.teachers.vllm_sglang import WHOLE, same_model
from opdkit.types import Rollout

VOCABULARY = 1 << 28  # bytes of a tokenizer's tokens and their ids, at most
FEW = 1e-3  # nats, and shares of hidden states' length: rounding
# of hidden states' length: two ways of asking about one token differ by rounding, two tokens by
# about as much as they are long
SAME_STATE = 0.3


def connect(
    endpoint: Endpoint, name: str, about: Sequence[Any], needs: Any, tokenizer: Any, model: str
) -> Numbers | HiddenStates:
    """Numbers where they are enough, hidden states and the head where the method reads the whole
    vocabulary.
    """
    for one in about:
        _refuse_card(one, endpoint)
    first = about[0]
    if any(card.get("shared") is True for card in about):  # they wait for other models' turns
        endpoint = replace(endpoint, timeout=max(endpoint.timeout, LONGEST))
    if any(other["fingerprint"] != first["fingerprint"] for other in about):
        raise UserError(
            f"the teacher's servers all call their model {name!r}, but their weights differ: start "
            "them from the same checkpoint"
        )
    if not has_digest(tokenizer, first["tokenizer"]):
        vocab = endpoint.request("GET", of_model("/tokenizer", name), None, _vocabulary, VOCABULARY)
        there: Any = SimpleNamespace(get_vocab=lambda: vocab, name_or_path=name)
        raise UserError(
            "the tokenizer of the teacher's server is not the student's: "
            f"{same_tokenizer(tokenizer, there)}. {FAMILY}"
        )
    rows, columns = first["rows"], first["columns"]
    known = usable(tokenizer, rows)
    common = (endpoint, name, first["fingerprint"], first["micro_batch_tokens"])
    made: Numbers | HiddenStates
    if needs.whole(model):

        def head(reply: Reply) -> Head:
            same_model(reply.headers.get(protocol.FINGERPRINT), first["fingerprint"], reply.url)
            return protocol.unpack_head(reply.content, rows, columns)

        most = protocol.AROUND + 4 * rows * (columns + 1)
        made = HiddenStates(
            *common, endpoint.request("GET", of_model("/head", name), None, head, most)
        )
    else:
        made = Numbers(*common, known, known if rows > known else None)
    for server in endpoint.each():
        _keeps_order(replace(made, endpoint=server), tokenizer)
    return made


def of_model(path: str, name: str) -> str:
    """A path, asked of one of a server's models."""
    return f"{path}?model={quote(name, safe='')}"


def _refuse_card(about: Any, endpoint: Endpoint) -> None:
    """What a server says of itself must be what one of this version says."""
    numbers = {"rows": 1 << 24, "columns": 1 << 18, "micro_batch_tokens": 1 << 40}
    good = (
        isinstance(about, Mapping)
        and all(isinstance(about.get(key), str) for key in ("fingerprint", "tokenizer"))
        and all(
            type(about.get(key)) is int and 1 <= about[key] <= most for key, most in numbers.items()
        )
    )
    if not good:
        raise UserError(
            f"the teacher's server ({', '.join(endpoint.urls)}) says of itself "
            f"{protocol.shown(about)}, which does not tell its weights, tokenizer and sizes: it is "
            "another version's. Start it with the opdkit that trains"
        )


def _vocabulary(reply: Reply) -> dict[str, int]:
    found = object_of(reply)["vocab"]
    return {str(token): int(id) for token, id in found.items()}


def _keeps_order(server: Numbers | HiddenStates, tokenizer: Any) -> None:
    """Its answers must be in the order of the request: what it says of the last tokens of a text is
    the same whether it is asked about all of them or about those alone.
    """
    ids = probe_ids(tokenizer)
    text = Rollout("the first request", ids[:1], ids[1:], [True] * (len(ids) - 1), [], [], "")
    layout = Layout([text], len(text.tokens))
    every, half = torch.arange(layout.width), torch.arange(layout.width // 2, layout.width)
    whole, part = server.look(layout, every)[half], server.look(layout, half)
    if bool(((whole - part).norm(dim=-1) > SAME_STATE * (FEW + part.norm(dim=-1))).any()):
        raise UserError(
            f"{server.endpoint.urls[0]} gives other numbers of a text's last tokens when it is "
            "asked about them alone: they come back in another order, or it does not say the same "
            "twice. None can be assigned to its token; use another server"
        )


@dataclass
class _Own(ABC):
    """`opdkit serve-teacher`: a request per micro-batch, composed as in this process, so that the
    numbers are the same. Every answer says which weights gave it.
    """

    elsewhere: ClassVar[bool] = True
    endpoint: Endpoint
    model: str
    fingerprint: str
    micro_batch_tokens: int

    def _ask(
        self,
        layout: Layout,
        parts: Sequence[Tensor],
        wanted: Collection[Fact],
        ids: Sequence[Mapping[TopFact, Tensor]],
        vocab: int | None,
    ) -> list[dict[str, Tensor]]:
        calls = [
            partial(
                self._post,
                _ids(layout, part),
                protocol.pack_request(layout, part, wanted, at, vocab),
                self._expected(len(part), wanted),
                partial(self._refuse, wanted),
            )
            for part, at in zip(parts, ids)
        ]
        return self.endpoint.map(calls)

    @abstractmethod
    def _expected(self, n: int, wanted: Collection[Fact]) -> protocol.Expected:
        """The tensors of an answer about n positions."""

    @abstractmethod
    def _refuse(self, wanted: Collection[Fact], tensors: Mapping[str, Tensor]) -> None:
        """A ValueError where numbers [n] or [n, k] cannot be what they stand for."""

    def _post(
        self,
        who: str,
        body: bytes,
        expected: protocol.Expected,
        refuse: Callable[[Mapping[str, Tensor]], None],
    ) -> dict[str, Tensor]:
        def read(reply: Reply, who: str) -> dict[str, Tensor]:
            same_model(reply.headers.get(protocol.FINGERPRINT, ""), self.fingerprint, who)
            tensors = protocol.unpack_answer(reply.content, body, expected)
            refuse(tensors)
            return tensors

        return self.endpoint.about(
            f"{who} at {self.model}",
            of_model("/score", self.model),
            body,
            read,
            protocol.size(expected),
            lambda refused: refused.message,
        )


def _ids(layout: Layout, positions: Tensor) -> str:
    ids = [layout.rollouts[b].id for b in (positions // layout.width).unique().tolist()]
    return (
        f"rollout {ids[0]}"
        if len(ids) == 1
        else f"rollouts {', '.join(ids[:4])}{'' if len(ids) <= 4 else f' and {len(ids) - 4} more'}"
    )


@dataclass
class Numbers(_Own):
    """Facts computed by the server."""

    tokens: int  # of the vocabulary
    vocab: int | None = None  # rows of the head to keep: those of the tokenizer

    def look(self, layout: Layout, positions: Tensor) -> Tensor:
        """[N, 1]: log-probs of the tokens at flat positions [N]."""
        fact = LogpFact("teacher")
        return self.facts([fact], layout, positions, {})[fact][:, None]

    def _expected(self, n: int, wanted: Collection[Fact]) -> protocol.Expected:
        return {
            str(i): (fact.dtype, (n, *(min(k, self.tokens) for k in fact.shape)))
            for i, fact in enumerate(sorted(wanted, key=repr))
        }

    def _refuse(self, wanted: Collection[Fact], tensors: Mapping[str, Tensor]) -> None:
        for i, fact in enumerate(sorted(wanted, key=repr)):
            values = tensors[str(i)]
            if not bool(possible(fact, values, self.tokens).all()):
                low, high = (f"{float(x):g}" for x in (values.min(), values.max()))
                raise ValueError(
                    f"{fact.words()} from {low} to {high}, which a model of {self.tokens} tokens "
                    "cannot say"
                )

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N]."""
        parts = layout.micro_batches(positions.cpu(), self.micro_batch_tokens)
        return asked_by_parts(
            wanted,
            positions,
            parts,
            ids,
            lambda at: self._ask(layout, parts, wanted, at, self.vocab),
        )

    said = facts

    def same_weights(self) -> None:
        """Every answer has said so."""


@dataclass
class HiddenStates(_Own):
    """The whole vocabulary: hidden states from the server, its head here."""

    head: Head

    def look(self, layout: Layout, positions: Tensor) -> Tensor:
        """[N, H]: hidden states at flat positions [N]."""
        source = self.source(layout, positions)
        return source.hidden[source.index[positions]].float()

    def _expected(self, n: int, wanted: Collection[Fact]) -> protocol.Expected:
        assert self.head.weight is not None
        return {"hidden": (self.head.weight.dtype, (n, self.head.weight.shape[1]))}

    def _refuse(self, wanted: Collection[Fact], tensors: Mapping[str, Tensor]) -> None:
        if not bool(tensors["hidden"].isfinite().all()):
            raise ValueError("hidden states that are not finite")

    @property
    def heads(self) -> list[Head]:
        return [self.head]

    def cut(self, vocab: int | None) -> HiddenStates:
        """The same teacher, its head kept to the first rows."""
        return replace(self, head=replace(self.head, vocab=vocab))

    def source(self, layout: Layout, positions: Tensor) -> Source:
        """Hidden states at flat positions [N]."""
        self.head = protocol.head_on(self.head, positions.device)
        parts = layout.micro_batches(positions.cpu(), self.micro_batch_tokens)
        answers = self._ask(layout, parts, (), [{}] * len(parts), None)
        hidden = [answer["hidden"] for answer in answers]
        return source_of(self.head, layout, parts, hidden, positions.device)


def possible(fact: Fact, values: Tensor, tokens: int) -> Tensor:
    """[N]: whether values [N] or [N, k] can be a fact of a model of so many tokens."""
    if fact.number == "ids":
        ranked = values.sort(-1).values
        apart = (ranked.diff(dim=-1) != 0).all(-1)
        return ((values >= 0) & (values < tokens)).all(-1) & apart
    rows = values.flatten(1) if values.dim() > 1 else values[:, None]
    good = rows.isfinite().all(-1)
    if fact.number == "entropy":
        return good & (rows >= -FEW).all(-1) & (rows <= math.log(tokens) + FEW).all(-1)
    if fact.number == "logp":
        good &= (rows <= FEW).all(-1) & (rows.exp().sum(-1) <= WHOLE)
        if not fact.others_first:  # at its own most probable ids, the first the most
            good &= (rows.diff(dim=-1) <= FEW).all(-1)
    return good
