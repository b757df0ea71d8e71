"""A teacher behind HTTP: vLLM, SGLang or `opdkit serve-teacher`.

What it can say is found by asking, before anything is trained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opdkit.base.errors import UserError
from opdkit.models.engines.chat import ChatServer
from opdkit.models.engines.endpoint import Endpoint, Refused
from opdkit.models.engines.exchange import addresses
from opdkit.models.engines.names import Card, card_of, cards_of
from opdkit.models.held import ELSEWHERE, Held
from opdkit.models.identity import Identity
from opdkit.models.shapes import Shape
from opdkit.models.tokenizers import real_vocabulary
from opdkit.objective.facts import Fact
from opdkit.teachers import client_serve, protocol
from opdkit.teachers.base import Remote, Scorer
from opdkit.teachers.client_vllm_sglang import Served, probe
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.early import BEGUN, Begun, EarlyNumbers, EarlyStates
from opdkit.teachers.refuse import refuse_facts
from opdkit.teachers.speech import VoiceElsewhere
from opdkit.teachers.teacher import Teacher
from opdkit.teachers.vllm_sglang import SGLang, Vllm, Wire


@dataclass(frozen=True)
class ServerTeacher(Teacher):
    """OpenAI-compatible endpoints of one model (vLLM, SGLang, `opdkit serve-teacher`): asked at the
    start what they can say.
    """

    kind = "server"
    urls: tuple[str, ...]
    model: str | None = None  # the name it is served under; null: the only one there
    concurrency: int = 16  # requests under way at once, over all urls
    timeout: float = 120.0  # seconds for one request
    retries: int = 5  # of what can succeed: refused connections, time-outs, 429, 5xx
    # environment variable that holds the key; keys are never written to a run
    api_key_env: str | None = None
    # whether rollouts are scored as each of them ends, while others are still being written; null:
    # where that changes no number (vLLM, SGLang). `opdkit serve-teacher` then reads each rollout by
    # itself: numbers differ by rounding from those of rollouts that it reads together
    early: bool | None = None

    def __post_init__(self) -> None:
        addresses(self.urls, "the teacher's server")
        if not self.urls:
            raise ValueError(
                "a server teacher needs at least one url, such as http://127.0.0.1:8000"
            )
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise ValueError("concurrency must be at least 1, timeout positive, retries at least 0")

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """URLs, and after a # the name of the model there."""
        urls, _, model = text.partition("#")
        return {"urls": urls.split(",")} | ({"model": model} if model else {})

    def says(self, fact: Fact, model: str) -> bool:
        """All, until it is asked."""
        return True

    def check(self, context: TeacherContext) -> None:
        self.open(context)

    def open(self, context: TeacherContext) -> Remote | Scorer:
        return context.once(repr(self), lambda: self._open(context))

    def _open(self, context: TeacherContext) -> Remote | Scorer:
        """The servers, once every one of them has shown that it serves one and the same model and
        can say what the method reads.
        """
        endpoint = self._endpoint()
        cards = _cards(endpoint, self.model)
        names = sorted({card["id"] for card in cards.values()})
        if len(names) > 1:
            raise UserError(
                f"the teacher's servers serve different models ({', '.join(names)}): say which is "
                "meant with teacher.model=NAME"
            )
        about = [card.get("opdkit") for card in cards.values()]
        if all(about):
            own = _ask_own(endpoint, names[0], about, context)
            return self._begun(replace(own, micro_batch_tokens=1), context) if self.early else own
        if any(about):
            raise UserError(
                "some of the teacher's servers are `opdkit serve-teacher` and some are not: use "
                "one kind, as their numbers differ"
            )
        others = _ask_others(endpoint, names[0], cards, context)
        return others if self.early is False else self._begun(others, context)

    def _begun(self, client: Any, context: TeacherContext) -> Remote | Scorer:
        """A client whose answers may be begun before they are asked for."""
        begun: Begun = context.once(BEGUN, Begun)
        begun.threads += self.concurrency
        kind = EarlyNumbers if isinstance(client, Remote) else EarlyStates
        return kind(client, begun, repr(self))

    def _endpoint(self) -> Endpoint:
        return Endpoint(
            self.urls,
            self.concurrency,
            self.timeout,
            self.retries,
            self.api_key_env,
            "the teacher's server",
        )

    @property
    def writes(self) -> bool:
        return True

    def voice(self, context: TeacherContext) -> VoiceElsewhere:
        setting = "{kind: server, urls: [URL], model: NAME}"
        return VoiceElsewhere(ChatServer(self._endpoint(), self.model, "the teacher", setting))

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        return [Held(role, f"server {', '.join(self.urls)}", ELSEWHERE)]

    def identity(self) -> Identity:
        return Identity(self.model or ",".join(self.urls))

    def recorded(self) -> Identity:
        return Identity(self.model or "the only model of a server")


def _ask_own(
    endpoint: Endpoint, name: str, about: list[Any], context: TeacherContext
) -> client_serve.Numbers | client_serve.HiddenStates:
    """Servers that are all `opdkit serve-teacher`, by what they say of themselves."""
    method = context.method
    beyond = [
        f
        for f in method.needs.of(context.role)
        if f.own_tokenizer or not (f.whole_vocabulary or protocol.known(f))
    ]
    refuse_facts(
        method.name or "own", "a server", beyond, "use a teacher in this process (teacher=MODEL)"
    )
    return client_serve.connect(
        endpoint, name, about, method.needs, context.tokenizer, context.role
    )


def _ask_others(
    endpoint: Endpoint, name: str, cards: dict[str, dict[str, Any]], context: TeacherContext
) -> Served:
    """Servers that are all vLLM or all SGLang; `cards` by URL are what they say of the model."""
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
    method, tokenizer = context.method, context.tokenizer
    known = context.vocabulary or real_vocabulary(tokenizer)
    served = Served(endpoint, wires[0], name, known, limit)
    ones = [replace(endpoint, urls=[url]) for url in cards]
    return probe(served, ones, method.name, method.needs, tokenizer, context.role)


def _cards(endpoint: Endpoint, wanted: str | None) -> dict[str, Card]:
    """By URL: what each server says of the model it serves. One of several may be down for now."""
    cards: dict[str, Card] = {}
    failed: UserError | None = None
    for one in endpoint.each():
        (url,) = one.urls
        try:
            known = one.request("GET", "/v1/models", None, cards_of)
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
        if not known:
            raise UserError(
                f"{url} serves no model, so there is no teacher: start it with one, or give "
                "another server"
            )
        card = card_of(known, wanted)
        names = ", ".join(card["id"] for card in known)
        if wanted is None and card is None:
            raise UserError(
                f"{url} serves {names}: say which is the teacher with teacher.model=NAME"
            )
        if card is None:
            raise UserError(
                f"{url} does not serve {wanted!r} but {names}: start it with "
                "that model, or set teacher.model"
            )
        cards[url] = card
    if not cards:
        assert failed is not None
        raise failed
    return cards
