"""The kinds of teachers, and which one a run has: a kind with its settings, from text or YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opdkit.base.config import build
from opdkit.base.errors import UserError, nearest
from opdkit.teachers.cached import CachedTeacher
from opdkit.teachers.local import LocalTeacher
from opdkit.teachers.mixture import MixtureTeacher
from opdkit.teachers.routed import RoutedTeacher
from opdkit.teachers.server import ServerTeacher
from opdkit.teachers.teacher import Teacher
from opdkit.teachers.vllm import VllmTeacher

KINDS: dict[str, type[Teacher]] = {
    kind.kind: kind
    for kind in (
        LocalTeacher,
        VllmTeacher,
        ServerTeacher,
        CachedTeacher,
        MixtureTeacher,
    )
}


def teacher_of(value: Any, where: str = "teacher") -> Teacher:
    """A teacher from what a run says: text, a group with `kind`, or several of these by route."""
    if isinstance(value, Mapping) and "kind" not in value:
        if not value:
            raise UserError(f"{where} names no teacher: give a model, or {{route: model}}")
        return RoutedTeacher(
            {str(name): one_teacher_of(inner, f"{where}.{name}") for name, inner in value.items()}
        )
    return one_teacher_of(value, where)


def one_teacher_of(value: Any, where: str = "teacher") -> Teacher:
    """One teacher: a model's folder or name; kind:...; a URL; or {kind: ..., settings}."""
    return _made(value, where).parsed(one_teacher_of, where)


def _made(value: Any, where: str) -> Teacher:
    if isinstance(value, Teacher):
        return value
    if isinstance(value, Mapping):
        kind = value.get("kind", "local")
        if kind not in KINDS:
            raise UserError(
                f"{where}.kind={kind!r} is no kind of teacher{nearest(str(kind), list(KINDS))}: "
                f"{', '.join(KINDS)}"
            )
        return build(KINDS[kind], {k: v for k, v in value.items() if k != "kind"}, where + ".")
    if not isinstance(value, str):
        raise UserError(
            f"{where} must be a model, kind:..., a URL or a group with `kind`, not {value!r}"
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):  # of servers: others say what is wrong
        value = "server:" + value
    kind, _, rest = value.partition(":")
    if rest and kind in KINDS and (settings := KINDS[kind].from_text(rest)):
        return build(KINDS[kind], settings, where + ".")
    return LocalTeacher(value)
