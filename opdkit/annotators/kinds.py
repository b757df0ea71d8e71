"""The kinds of annotators, and those of a run: kinds with their settings, from text or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.annotators.debate import DebateSettings
from opdkit.annotators.settings import AnnotatorSettings
from opdkit.annotators.skills import SkillSettings
from opdkit.annotators.spans import SpanSettings
from opdkit.base.config import build
from opdkit.base.errors import UserError
from opdkit.base.kinds import known_kind

KINDS: dict[str, type[AnnotatorSettings]] = {
    kind.kind: kind
    for kind in (
        SpanSettings,
        DebateSettings,
        SkillSettings,
    )
}


def annotator_of(value: Any, where: str = "annotate", name: str = "") -> AnnotatorSettings:
    """One annotator: a kind, kind:..., {kind: ..., settings}; where its name is a kind's, the kind
    may be left out: annotate.spans=rules.
    """
    if isinstance(value, AnnotatorSettings):
        return value
    group = _group(value, where, name)
    kind = known_kind(group.pop("kind", name), KINDS, where, "annotator")
    return build(KINDS[kind], group, where + ".")


def annotators_of(
    mine: Mapping[str, Any], usual: Mapping[str, Any] | None = None
) -> dict[str, AnnotatorSettings]:
    """Annotators by name, in their order: what a run says (`mine`) wins over what its method brings
    (`usual`), name by name, and null switches one off. A group without `kind` changes only what it
    says of the method's own.
    """
    merged: dict[str, Any] = {k: _group(v, f"annotate.{k}", k) for k, v in (usual or {}).items()}
    for name, value in mine.items():
        group = None if value is None else _group(value, f"annotate.{name}", name)
        changed = group is not None and "kind" not in group
        merged[name] = {**(merged.get(name) or {}), **(group or {})} if changed else group
    return {
        name: annotator_of(group, f"annotate.{name}", name)
        for name, group in merged.items()
        if group is not None
    }


def _group(value: Any, where: str, name: str) -> dict[str, Any]:
    """What is said of an annotator as a group of settings, with `kind` where that is said."""
    if isinstance(value, str):
        return _from_text(value, where, name)
    if not isinstance(value, Mapping):
        raise UserError(
            f"{where} must be a kind of annotator, kind:..., or a group with `kind`, not {value!r}"
        )
    group = {str(key): inner for key, inner in value.items()}
    # a text that was followed by some settings: annotate.spans=rules annotate.spans.coverage=0.1
    text = group.pop("name", None)
    return group if text is None else {**_from_text(str(text), where, name), **group}


def _from_text(text: str, where: str, name: str) -> dict[str, Any]:
    kind, _, rest = text.partition(":")
    if kind not in KINDS and name in KINDS:
        kind, rest = name, text
    main = KINDS[known_kind(kind, KINDS, where, "annotator")].main
    if rest and main is None:
        raise UserError(
            f"{where}={text}: nothing may follow the name of this kind, as its settings have names "
            f"of their own: {{kind: {kind}, NAME: VALUE}}"
        )
    return {"kind": kind, **({main: rest} if main and rest else {})}
