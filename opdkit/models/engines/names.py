"""Which of the models that a server lists is meant, and by which of its names answers call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkit.models.engines.exchange import Broken, Reply, object_of, shown

Card = dict[str, Any]  # what /v1/models says of a model


def cards_of(reply: Reply) -> list[Card]:
    """The models that an answer of /v1/models lists: each with a name, and, if it says how many
    tokens it reads, a number.
    """
    cards = object_of(reply).get("data") or []
    for card in cards:
        limit = card.get("max_model_len")
        if not isinstance(card["id"], str) or not (
            limit is None or (type(limit) is int and limit > 0)
        ):
            raise Broken(f"{shown(repr(card))} is no model's card")
    return list(cards)


def card_of(cards: Sequence[Card], wanted: str | None) -> Card | None:
    """The card of the wanted model, or of the only one; None where it is not there, or several are.

    A model that is served under several names (`--served-model-name a b`) has a card for each, all
    with one root: the first is taken, as answers bear that name whichever was asked for.
    """
    named = [card for card in cards if wanted in (None, card["id"])]
    if len({_root(card) for card in named}) != 1:
        return None
    return next(card for card in cards if _root(card) == _root(named[0]))


def _root(card: Card) -> tuple[Any, Any]:
    return card.get("root") or card["id"], card.get("parent")
