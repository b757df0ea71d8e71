"""A teacher behind HTTP: vLLM, SGLang or `opdkit serve-teacher`.

What it can say is found by asking, before anything is trained.
"""

from __future__ import annotations

import sys
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
from opdkit.models.tokenizers import real_vocabulary, same_tokenizer
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.head import Head, Source
from opdkit.objective.supply import Tensors
from opdkit.teachers import protocol
from opdkit.teachers.base import Remote, Scorer
from opdkit.teachers.kinds import REMEDY, Server, refuse_facts
from opdkit.teachers.scored_facts import Scored, without_positions
from opdkit.teachers.vllm_sglang import Ask, SGLang, Vllm, Wire, same_model

# what every server reads at the start
PROBE = "The sum of 12 and 30 is 42. Let x = f(y) / 2; naïve café, 你好, привет!"
PROBE_TOKENS = 48
# nats, mean difference of two servers' log-probs of the probe: number formats differ by a tenth of
# that
SAME_MODEL = 0.2
FAMILY = (
    "Token-level distillation compares distributions over the same ids; use a teacher of the "
    "student's family"
)
SAME_NUMBER = 0.05  # nats, between two ways of asking one server for the same log-prob


def open_teacher(
    spec: Server, method: Any, tokenizer: Any, model: str = "teacher"
) -> Remote | Scorer:
    """The teacher, once every server of `spec` has shown that it serves one and the same model and
    can say what the method reads.
    """
    endpoint = Endpoint(
        spec.urls,
        spec.concurrency,
        spec.timeout,
        spec.retries,
        spec.api_key_env,
        "the teacher's server",
    )
    cards = _cards(endpoint, spec.model)
    names = sorted({card["id"] for card in cards.values()})
    if len(names) > 1:
        raise UserError(
            f"the teacher's servers serve different models ({', '.join(names)}): say which is "
            "meant with teacher.model=NAME"
        )
    about = [card.get("opdkit") for card in cards.values()]
    needs = method.needs
    if all(about):
        beyond = [
            f
            for f in needs.of(model)
            if f.own_tokenizer or not (f.whole_vocabulary or protocol.known(f))
        ]
        refuse_facts(
            method.name or "own",
            "a server",
            beyond,
            "use a teacher in this process (teacher=MODEL)",
        )
        return _own(endpoint, names[0], about, needs, tokenizer, model)
    if any(about):
        raise UserError(
            "some of the teacher's servers are `opdkit serve-teacher` and some are not: use one "
            "kind, as their numbers differ"
        )
    wires: list[Wire] = [
        SGLang() if card.get("owned_by") == "sglang" else Vllm() for card in cards.values()
    ]
    if len({wire.kind for wire in wires}) > 1:
        raise UserError(
            "some of the teacher's servers are vLLM and some SGLang: use one kind, as their "
            "numbers differ"
        )
    limit = min(
        (card["max_model_len"] for card in cards.values() if card.get("max_model_len")),
        default=None,
    )
    served = Served(endpoint, wires[0], names[0], real_vocabulary(tokenizer), limit)
    _probe(
        served,
        [replace(endpoint, urls=[url]) for url in cards],
        method.name,
        needs,
        tokenizer,
        model,
    )
    return served


def _cards(endpoint: Endpoint, wanted: str | None) -> dict[str, dict[str, Any]]:
    """By URL: what each server says of the model it serves. One of several may be down for now."""
    cards: dict[str, dict[str, Any]] = {}
    failed: UserError | None = None
    for one in endpoint.each():
        (url,) = one.urls
        try:
            listed = one.get("/v1/models").get("data")
        except Refused as refused:
            raise UserError(
                f"{url} does not list its models at /v1/models ({refused.status}): it is not an "
                "OpenAI-compatible server, or another path belongs into the URL"
            ) from refused
        except UserError as error:
            if len(endpoint.urls) > 1:
                print(f"opdkit: {error}. The others go on without it", file=sys.stderr)
            failed = error
            continue
        known = {
            card["id"]: card for card in listed or [] if isinstance(card, dict) and "id" in card
        }
        if wanted is None and len(known) != 1:
            raise UserError(
                f"{url} serves {', '.join(known) or 'no model'}: say which is the teacher with "
                "teacher.model=NAME"
            )
        if wanted is not None and wanted not in known:
            raise UserError(
                f"{url} does not serve {wanted!r} but {', '.join(known) or 'nothing'}: start it "
                "with that model, or set teacher.model"
            )
        cards[url] = known[wanted or next(iter(known))]
    if not cards:
        assert failed is not None
        raise failed
    return cards


# ---------------------------------------------------------------------------------- vLLM and SGLang


@dataclass(frozen=True)
class Served:
    """Log-probs from vLLM or SGLang servers, a request per rollout."""

    endpoint: Endpoint
    wire: Wire
    model: str  # the name it is served under
    tokens: int  # ids that the student's tokenizer has
    limit: int | None = None  # tokens that the server can read at once

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N]."""
        rows = positions.cpu() // layout.width
        used = rows.unique().tolist()
        index = [(rows == b).nonzero()[:, 0] for b in used]
        at = {f: ids[top].cpu() for f in wanted for top in f.others_first}
        calls = [
            partial(
                self._rollout,
                wanted,
                layout,
                b,
                positions.cpu()[i] % layout.width,
                {f: v[i] for f, v in at.items()},
            )
            for b, i in zip(used, index)
        ]
        answers = self.endpoint.map(calls)
        made: Tensors = {}
        for fact in wanted if answers else ():
            values = torch.cat([answer[fact] for answer in answers])
            made[fact] = (
                torch.empty_like(values)
                .index_copy_(0, torch.cat(index), values)
                .to(positions.device)
            )
        return made or {f: without_positions(f, positions.device) for f in wanted}

    def _rollout(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        b: int,
        t: Tensor,
        at: Mapping[Fact, Tensor],
    ) -> Tensors:
        """The facts of one rollout at its response positions t [n]."""
        rollout = layout.rollouts[b]
        first, last = int(t.min()), int(t.max())
        start = len(rollout.prompt) + first
        tokens = (rollout.prompt + rollout.tokens)[: len(rollout.prompt) + last + 1]
        ask = Ask(f"rollout {rollout.id} at {self.model}", tokens, start)
        if self.limit is not None and len(tokens) + 1 > self.limit:
            raise UserError(
                f"{ask.who}: {len(tokens)} tokens and one more do not fit the server's context of "
                f"{self.limit}. Nothing is cut, as a cut context changes every score: start the "
                f"server with a context of at least {len(tokens) + 1} (--max-model-len, "
                "--context-length), or lower max_completion_length or data.max_prompt_length"
            )
        made: Tensors = {}
        if set(wanted) - set(at):
            deepest = max(f.depth(f.models[0]) for f in wanted if f not in at)
            scored = self.wire.scores(self.endpoint, self.model, ask, deepest)
            self._known(scored, ask)
            for fact in set(wanted) - set(at):
                made[fact] = fact.of_notes(scored)[t - first]
        for fact, ids in at.items():
            full = torch.tensor(tokens[start:])[:, None].expand(-1, ids.shape[1]).clone()
            full[t - first] = ids
            made[fact] = self.wire.at(self.endpoint, self.model, ask, full)[t - first]
        return made

    def _known(self, scored: Scored, ask: Ask) -> None:
        """A row of the head that only pads it has no token."""
        if scored.top_ids.numel() and (largest := int(scored.top_ids.max())) >= self.tokens:
            raise UserError(
                f"{ask.who}: among its most probable tokens is id {largest}, and the tokenizer has "
                f"{self.tokens}: it is a padded row of the teacher's head. Lower the method's k, "
                "or use `opdkit serve-teacher`, which cuts such rows"
            )


def _probe(
    served: Served, ones: Sequence[Endpoint], name: str, needs: Any, tokenizer: Any, model: str
) -> None:
    """One short text is scored by every server: the answers must be whole, aligned, of the
    student's tokens, and alike.
    """
    who = f"a {served.wire.kind} server"
    read = [f for f in needs.of(model) if f.models[0] == model]
    refuse_facts(
        name or "own",
        who,
        [
            f
            for f in needs.of(model)
            if not (f.in_scores(model) or (f.others_first and protocol.known(f)))
        ],
    )
    k = max((f.depth(model) for f in needs.of(model)), default=0)
    tokens = tokenizer.encode(PROBE, add_special_tokens=False)[:PROBE_TOKENS]
    # the largest id: a smaller vocabulary refuses it
    tokens += [tokenizer.eos_token_id or 0, served.tokens - 1]
    said: dict[str, Tensor] = {}
    for one in ones:
        ask = Ask(f"the first request to {one.urls[0]}", tokens, 1)
        scored = served.wire.scores(one, served.model, ask, k)
        if k and float(scored.top_logp.exp().sum(-1).max()) > 1.001:
            raise UserError(
                f"{one.urls[0]} returns numbers that are no log-probs of its whole vocabulary "
                f"(their probabilities sum to {float(scored.top_logp.exp().sum(-1).max()):.3f}): "
                "start it without a --logprobs-mode of its own"
            )
        _same_texts(served.wire.texts(one, served.model, ask), tokenizer, one.urls[0])
        for fact in read:
            if fact.others_first:
                _at_works(served, one, ask, scored, fact, name)
        said[one.urls[0]] = scored.logp
    (first, expected), *others = said.items()
    for url, logp in others:
        gap = float((logp - expected).abs().mean())
        if gap > SAME_MODEL:
            raise UserError(
                f"{first} and {url} both serve {served.model!r} and do not agree: their log-probs "
                f"of one text differ by {gap:.2f} nats on average, so their weights are different. "
                "Start them from the same checkpoint"
            )


def _at_works(
    served: Served, one: Endpoint, ask: Ask, scored: Scored, fact: Fact, name: str
) -> None:
    """Whether log-probs at given ids come back, and are those of the tokens themselves when these
    are asked about.
    """
    own = torch.tensor(ask.tokens[ask.start :])[:, None]
    try:
        gap = float((served.wire.at(one, served.model, ask, own)[:, 0] - scored.logp).abs().max())
    except UserError as error:
        why = f"asked for log-probs at given ids, it says: {str(error).partition(': ')[2]}. "
        refuse_facts(
            name or "own",
            f"the {served.wire.kind} server",
            [fact],
            why + REMEDY[0].upper() + REMEDY[1:],
        )
    else:
        if gap > SAME_NUMBER:
            raise UserError(
                f"{one.urls[0]} gives log-probs at given ids that differ by {gap:.2f} nats from "
                "those of the same tokens: no number of it can be trusted. Use another version of "
                "the server"
            )


def _same_texts(texts: Mapping[int, str], tokenizer: Any, url: str) -> None:
    """The server's text of a token must be the student's.

    Only plain ones are compared: pieces of characters are shown in many ways.
    """
    compared = 0
    for id, text in texts.items():
        own = tokenizer.decode([id]).strip()
        if own and own.isascii() and text.strip():
            compared += 1
            if text.strip() != own:
                raise UserError(
                    f"the tokenizer of {url} is not the student's: token {id} is {text!r} there "
                    f"and {own!r} here. {FAMILY}"
                )
    if not compared:
        print(
            f"opdkit: {url} does not say its tokens' texts, so its tokenizer cannot be compared "
            "with the student's",
            file=sys.stderr,
        )


# ----------------------------------------------------------------------------- opdkit serve-teacher


def _own(
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
    known = real_vocabulary(tokenizer)
    common = (endpoint, name, first["fingerprint"], first["micro_batch_tokens"])
    if needs.whole(model):
        body = endpoint.request(
            "GET", "/head", None, lambda response: protocol.unpack_head(response.content)
        )
        return HiddenStates(*common, body)
    if first["rows"] < known:
        raise UserError(
            f"the head of the teacher's server has {first['rows']} rows, fewer than the "
            f"tokenizer's {known} tokens"
        )
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
            values = torch.cat([answer[str(number)] for answer in answers])
            made[fact] = (
                torch.empty_like(values)
                .index_copy_(0, torch.cat(index), values)
                .to(positions.device)
            )
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
        index = torch.full(
            (len(layout.rollouts) * layout.width,), -1, dtype=torch.int64, device=positions.device
        )
        if not parts:
            weight = self.head.weight
            return Source(
                torch.zeros(0, 0 if weight is None else weight.shape[1], device=positions.device),
                index,
                self.head,
            )
        index[torch.cat(parts).to(positions.device)] = torch.arange(
            len(positions), device=positions.device
        )
        return Source(
            torch.cat([answer["hidden"] for answer in answers]).to(positions.device),
            index,
            self.head,
        )
