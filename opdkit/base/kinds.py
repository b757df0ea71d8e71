"""A setting that is one of several kinds, each a class of settings of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.base.config import build
from opdkit.base.errors import UserError, nearest, shown


def known_kind(kind: Any, kinds: Mapping[str, Any], where: str, what: str, own: str = "") -> str:
    """The kind itself; an error that lists all where it is none of them.

    Arguments:
        where: the setting's name.
        what: what it is a kind of.
        own: how one's own is named, if it can be.
    """
    if isinstance(kind, str) and kind in kinds:
        return kind
    raise UserError(
        f"{where}: {shown(kind)} is no kind of {what}{nearest(str(kind), list(kinds))}: "
        f"{', '.join(kinds)}{own}"
    )


def of_text(kinds: Mapping[str, Any], kind: str, rest: str, where: str, said: str) -> Any:
    """Settings of a kind from text: what follows its colon, if anything does.

    Arguments:
        said: the whole text.
    """
    settings = kinds[kind].from_text(rest) if rest else {}
    if rest and not settings:
        raise UserError(
            f"{where}={said}: nothing may follow the name of this kind, as its settings have names "
            f"of their own: {{kind: {kind}, NAME: VALUE}}"
        )
    return build(kinds[kind], settings, where + ".")
