"""What the docstring of a method says of its arguments, and what several methods make of theirs:
checks, and the student as its own teacher.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

TITLE = "Arguments:"
DEFAULT = " Default: "


@dataclass(frozen=True)
class Argument:
    """What is said of an argument: its meaning with unit and range, and its default's source."""

    meaning: str
    source: str = ""


def described(doc: str) -> tuple[str, dict[str, Argument]]:
    """A docstring, white space as `inspect.getdoc` leaves it, without its section on arguments; and
    that section, argument by argument.

        Arguments:
            gamma: meaning, unit and range of it, in as many lines
                as it takes. Default: where it comes from.
            tau: ...
    """
    before, title, section = doc.partition(f"{TITLE}\n")
    if not title or not before.endswith("\n\n"):
        return doc, {}
    texts: dict[str, str] = {}
    lines = section.splitlines()
    while lines and (not lines[0] or lines[0].startswith("    ")):
        line = lines.pop(0)
        named = re.match(r"    (\w+): (.*)", line)
        if named:
            texts[named[1]] = named[2]
        elif texts and line.strip():
            texts[next(reversed(texts))] += f" {line.strip()}"
    found = {}
    for name, text in texts.items():
        meaning, _, source = text.partition(DEFAULT)
        found[name] = Argument(meaning.strip(), source.strip())
    after = "\n".join(lines)
    return f"{before.rstrip()}\n\n{after}".rstrip(), found


def one_of(**choices: tuple[object, Collection[object]]) -> None:
    """Refuses an argument that is none of those known: one_of(mode=(mode, ("mean", "minmax")))."""
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, known))}")


def shares(**given: tuple[float, str]) -> None:
    """Refuses an argument outside [0, 1], with what it means: shares(mix=(mix, "it is ..."))."""
    for name, (value, meaning) in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in [0, 1]: {meaning}")


def inside(**given: tuple[float, str]) -> None:
    """Refuses an argument that is not strictly between 0 and 1, with what it means."""
    for name, (value, meaning) in given.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} must lie strictly between 0 and 1: {meaning}")


def positive(**given: tuple[float, str]) -> None:
    """Refuses an argument that is not above 0, with what it means; infinity is."""
    for name, (value, meaning) in given.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive: {meaning}")


def not_negative(**given: tuple[float, str]) -> None:
    """Refuses an argument below 0, with what it means; infinity is not."""
    for name, (value, meaning) in given.items():
        if not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0: {meaning}")


def itself(view: str, weights: str, **average: Any) -> dict[str, Any]:
    """The student under another context as its own teacher, in the words of a run's `teacher`:
    what it reads there, which of its weights score, and where these are an average its settings.
    """
    one_of(teacher=(weights, ("fixed", "ema", "live")))
    settings = average if weights == "ema" else {}
    return {"kind": "self", "weights": weights, **settings, "view": view}
