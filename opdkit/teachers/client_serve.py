"""The client of `opdkit serve-teacher`: numbers of the server, or its hidden states and head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import Endpoint, Refused
from opdkit.models.identity import has_digest
from opdkit.models.layout import Layout
from opdkit.models.tokenizers import same_tokenizer, usable
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.head import Head, Source
from opdkit.objective.supply import Tensors
from opdkit.teachers import protocol
from opdkit.teachers.base import Remote, Scorer, in_order, source_of
from opdkit.teachers.client_vllm_sglang import FAMILY
from opdkit.teachers.scored_facts import without_positions
from opdkit.teachers.vllm_sglang import same_model


def connect(
    endpoint: Endpoint, name: str, about: Sequence[Any], needs: Any, tokenizer: Any, model: str
) -> Remote | Scorer:
    """Numbers where they are enough, hidden states and the head where the method reads the whole
    vocabulary.
    """
    first = about[0]
    if any(other["fingerprint"] != first["fingerprint"] for other in about):
        raise UserError(
            f"the teacher's servers all call their model {name!r}, but their weights differ: start "
            "them from the same checkpoint"
        )
    if not has_digest(tokenizer, first["tokenizer"]):
        theirs = endpoint.get("/tokenizer")
        there: Any = SimpleNamespace(get_vocab=lambda: theirs["vocab"], name_or_path=theirs["name"])
        raise UserError(
            "the tokenizer of the teacher's server is not the student's: "
            f"{same_tokenizer(tokenizer, there)}. {FAMILY}"
        )
    common = (endpoint, name, first["fingerprint"], first["micro_batch_tokens"])
    if needs.whole(model):
        body = endpoint.request(
            "GET", "/head", None, lambda response: protocol.unpack_head(response.content)
        )
        return HiddenStates(*common, body)
    known = usable(tokenizer, first["rows"])
    return Numbers(*common, known if first["rows"] > known else None)


@dataclass
class _Own:
    """`opdkit serve-teacher`: a request per micro-batch, composed as in this process, so that the
    numbers are the same.
    """

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
                len(part),
            )
            for part, at in zip(parts, ids)
        ]
        return self.endpoint.map(calls)

    def _post(self, who: str, body: bytes, n: int) -> dict[str, Tensor]:
        def read(response: Any) -> dict[str, Tensor]:
            same_model(response.headers.get(protocol.FINGERPRINT), self.fingerprint, who)
            tensors, _ = protocol.unpack(response.content)
            if any(len(t) != n for t in tensors.values()):
                raise ValueError(
                    f"{n} positions were asked about and {[len(t) for t in tensors.values()]} came "
                    "back"
                )
            return tensors

        try:
            return self.endpoint.request("POST", "/score", body, read)
        except Refused as refused:
            raise UserError(
                f"{who} at {self.model} ({refused.url}): {refused.message}"
            ) from refused
        except UserError as error:
            raise UserError(
                f"{who} at {self.model}: {error}. Nothing was learnt from this step"
            ) from error


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

    vocab: int | None = None  # rows of the head to keep: those of the tokenizer

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N]."""
        where = positions.cpu()
        parts = layout.micro_batches(where, self.micro_batch_tokens)
        place = torch.zeros(len(layout.rollouts) * layout.width, dtype=torch.int64)
        place[where] = torch.arange(len(where))
        index = [place[part] for part in parts]
        answers = self._ask(
            layout,
            parts,
            wanted,
            [{f: v.cpu()[i] for f, v in ids.items()} for i in index],
            self.vocab,
        )
        made: Tensors = {}
        for number, fact in enumerate(sorted(wanted, key=repr) if parts else ()):
            values = [answer[str(number)] for answer in answers]
            made[fact] = in_order(values, index, positions.device)
        return made or {f: without_positions(f, positions.device) for f in wanted}


@dataclass
class HiddenStates(_Own):
    """The whole vocabulary: hidden states from the server, its head here."""

    head: Head

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
