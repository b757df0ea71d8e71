"""The kinds of teachers, and which one a run has: a kind with its settings, from text or YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from opdkit.base.config import build
from opdkit.base.errors import UserError, nearest
from opdkit.data.views import view_of
from opdkit.teachers.absent import NoTeacher
from opdkit.teachers.cached import CachedTeacher
from opdkit.teachers.local import LocalTeacher
from opdkit.teachers.mixture import MixtureTeacher
from opdkit.teachers.own import SelfTeacher
from opdkit.teachers.recorded import RecordedTeacher
from opdkit.teachers.routed import RoutedTeacher
from opdkit.teachers.server import ServerTeacher
from opdkit.teachers.soup import SoupTeacher
from opdkit.teachers.teacher import Teacher
from opdkit.teachers.views.privileged import ViewedTeacher
from opdkit.teachers.vllm import VllmTeacher

KINDS: dict[str, type[Teacher]] = {
    kind.kind: kind
    for kind in (
        LocalTeacher,
        VllmTeacher,
        ServerTeacher,
        CachedTeacher,
        MixtureTeacher,
        SoupTeacher,
        SelfTeacher,
        RecordedTeacher,
    )
}
OF_SELF = frozenset(f.name for f in fields(SelfTeacher()))


def teacher_of(value: Any, where: str = "teacher") -> Teacher:
    """A teacher from what a run says: text, a group with `kind`, or several of these by route; None
    is none. A `view` beside these is what all of them read questions under.
    """
    if value is None:
        return NoTeacher()
    if isinstance(value, Mapping) and "kind" not in value and not is_part(value):
        routes = {str(name): inner for name, inner in value.items() if name != "view"}
        if not routes:
            raise UserError(f"{where} names no teacher: give a model, or {{route: model}}")
        routed = RoutedTeacher(
            {name: one_teacher_of(inner, f"{where}.{name}") for name, inner in routes.items()}
        )
        return seen_through(value.get("view"), routed, where)
    return one_teacher_of(value, where)


def is_part(value: Any) -> bool:
    """Whether a group says something of a teacher without naming one, such as {view: solution}: the
    rest is the method's to say.
    """
    return isinstance(value, Mapping) and bool(value) and set(value) <= {"view", *OF_SELF}


def one_teacher_of(value: Any, where: str = "teacher") -> Teacher:
    """One teacher: a model's folder or name; kind:...; a URL; or {kind: ..., settings}."""
    return _made(value, where).parsed(one_teacher_of, where)


def takes_model(kind: Any) -> bool:
    """Whether teachers of a kind are one model that a setting names."""
    known = fields(KINDS[kind]) if kind in KINDS else ()  # type: ignore[arg-type]
    return kind not in KINDS or "model" in {f.name for f in known}


def seen_through(view: Any, teacher: Teacher, where: str) -> Teacher:
    """A teacher behind a view; None or "plain": behind none."""
    if view in (None, "plain"):
        return teacher
    return ViewedTeacher(teacher, view_of(view, f"{where}.view"))


def completed(value: Any, usual: Any, name: str = "teacher", who: str = "the method") -> Any:
    """What a run says of a model, with what its method says of it where the run does not.

    A run that names another model keeps the method's view of it, unless it names a view too: `view:
    plain` is none. Where the method says of which kind it is and leaves to the run what of, the run
    names one of that kind. name: what the objective calls it; who: the method, in errors.
    """
    if usual is not None and open_kind(usual):
        return _of_kind(value, usual, name, who)
    if value is None:
        return usual if "kind" in (usual or {}) else None
    if usual is None:
        return {"kind": SelfTeacher.kind, **value} if is_part(value) else value
    if is_part(value):
        kept = {"kind", "view"} if "weights" in value else set(usual)
        return {**{name: usual[name] for name in kept & set(usual)}, **value}
    named = dict(value) if isinstance(value, Mapping) else one_teacher_of(value).said()
    return {**({"view": usual["view"]} if "view" in usual else {}), **named}


def open_kind(usual: Mapping[str, Any]) -> bool:
    """Whether words of a method name a kind of teacher and not what it is made of, such as {kind:
    soup}.
    """
    kind = KINDS.get(usual.get("kind", ""))
    settings = () if kind is None else fields(kind)  # type: ignore[arg-type]
    needed = {f.name for f in settings if f.default is MISSING}
    return kind is not None and kind.main in needed - set(usual)


def _of_kind(value: Any, usual: Mapping[str, Any], name: str, who: str) -> dict[str, Any]:
    """A teacher of the kind that a method says, with the method's settings where the run has none
    of its own.
    """
    kind = usual["kind"]
    setting = name if name in ("teacher", "reference") else f"models.{name}"
    said = {} if value is None else one_teacher_of(value, name).said()
    if said.get("kind") != kind:
        other = "names none" if value is None else f"names one of the kind {said.get('kind')}"
        raise UserError(
            f"{who} has a {name} of the kind {kind}, and the run {other}: give the run what it is "
            f"made of, {setting}={kind}:A,B with your own A and B (see docs/teachers.md)"
        )
    return {**usual, **{k: v for k, v in said.items() if v is not None}}


def _made(value: Any, where: str) -> Teacher:
    if isinstance(value, Teacher):
        return value
    if isinstance(value, Mapping):
        kind = value.get("kind", "self" if is_part(value) else "local")
        if kind not in KINDS:
            raise UserError(
                f"{where}.kind={kind!r} is no kind of teacher{nearest(str(kind), list(KINDS))}: "
                f"{', '.join(KINDS)}"
            )
        settings = {k: v for k, v in value.items() if k not in ("kind", "view")}
        teacher = build(KINDS[kind], settings, where + ".")
        return seen_through(value.get("view"), teacher.parsed(one_teacher_of, where), where)
    if not isinstance(value, str):
        raise UserError(
            f"{where} must be a model, kind:..., a URL or a group with `kind`, not {value!r}"
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):  # of servers: others say what is wrong
        value = "server:" + value
    kind, _, rest = value.partition(":")
    if kind in KINDS and not rest and KINDS[kind].alone:
        return build(KINDS[kind], {}, where + ".")
    if rest and kind in KINDS and (settings := KINDS[kind].from_text(rest)):
        return build(KINDS[kind], settings, where + ".")
    return LocalTeacher(value)
