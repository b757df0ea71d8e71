"""A model behind an OpenAI-compatible server that is asked in messages and answers in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import Endpoint, Refused


@dataclass
class ChatServer:
    """Chat completions of one model.

    role: who it is, in errors ("the judge"). setting: how a person names the model ("model: NAME in
    the judge's settings").
    """

    endpoint: Endpoint
    model: str | None  # the name it is served under; null: the only one there
    role: str
    setting: str

    @cached_property
    def served(self) -> str:
        """The model's name at the server; an error that says what is there where it is not."""
        try:
            listed = self.endpoint.get("/v1/models").get("data")
        except Refused as refused:
            # it does not list its models
            if self.model is not None and refused.status in (404, 405):
                return self.model
            raise
        names = [str(card.get("id")) for card in listed or [] if isinstance(card, dict)]
        if self.model in names:
            return str(self.model)
        if self.model is None and len(names) == 1:
            return names[0]
        wanted = (
            f"say which is {self.role}" if self.model is None else f"there is no {self.model!r}"
        )
        raise UserError(
            f"{self.role}'s server has {', '.join(names) or 'no model'}: {wanted} ({self.setting})"
        )

    def say(
        self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], who: str
    ) -> tuple[str, str]:
        """Its words, and why it stopped. who: what is asked about, in errors."""
        body = {"model": self.served, "messages": list(messages), **settings}
        try:
            choice = self.endpoint.post("/v1/chat/completions", body)["choices"][0]
            return str(choice["message"].get("content") or ""), str(choice.get("finish_reason"))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"{who}: {self.role}'s server answers in a form that is not a chat completion's"
            ) from error
        except UserError as error:
            raise UserError(f"{who}: {error}") from error
