"""A rollout as a person reads a dialogue: by turns who wrote what, the student's tokens coloured
by credit, its calls of tools set apart, and what the environment answered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from opdkit.report.numbers import number

TOKENS_SHOWN = 500  # of one answer
EPISODE_SHOWN = 1500  # of an episode, what the environment wrote not counted
OBSERVATION_SHOWN = 4000  # characters of one answer of the environment
SHADES = 5  # of each colour
COLUMNS = ("credit", "weight", "logp", "teacher_logp")

WHO = {  # who wrote a part of a response, in words; the keys are style classes too
    "student": "student",
    "environment": "environment",
    "guide": "written for the student: a teacher's beginning",
    "data": "given: read from the data, or replayed of an expert",
}
# the heading of a part that has none
PLAIN = {"author": "", "turn": "", "tokens": "", "kl": ""}
# Calls of tools, as chat templates write them; none can take longer than its text is long
CALL = re.compile(
    r"<tool_call>.*?(?:</tool_call>|\Z)"
    r"|<function[=_].*?(?:</function\w*>|\Z)"
    r"|<｜tool▁calls?▁begin｜>.*?(?:<｜tool▁calls?▁end｜>|\Z)"
    r"|<\|tool_calls?(?:_section)?_begin\|>.*?(?:<\|tool_calls?(?:_section)?_end\|>|\Z)"
    r"|```(?:tool_code\b|tool_call\b|json\s*\{\s*\"name\").*?(?:```|\Z)"
    r"|(?:\[TOOL_CALLS\]|<\|python_tag\|>|<\|tool_call\|>).*"
    r"|\A\s*\{\s*\"(?:name|function|type)\"\s*:.*\}(?=\s*(?:<\|\w{1,40}\|>\s*)?\Z)",
    re.DOTALL,
)
# what a chat template writes between turns
FRAME = re.compile(
    r"(<\|(?:im_start|start_header_id)\|>\w*|<start_of_turn>\w*|<end_of_turn>"
    r"|<\|[^|<>\n]{1,40}\|>|</?s>|\[/?INST\])"
)
# Not allowed in HTML, or able to reorder or hide the text around them; shown as a visible sign
# instead.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


@dataclass(frozen=True)
class Part:
    """Tokens of a rollout that one wrote in one turn: from `start` on, up to `end`."""

    turn: int
    author: str
    start: int
    end: int


def dialogue(row: dict[str, Any], full: float) -> dict[str, Any]:
    """What the template shows of a sample's response: its parts, and how many tokens it leaves out.

    `full` is the credit that has the full colour. A single answer of the student is one part
    without a heading.
    """
    pieces: list[str] = row.get("pieces") or []
    columns = [padded(row.get(name), len(pieces)) for name in COLUMNS]
    found = parts(row.get("parts") or (), len(pieces))
    single = all(part.author == "student" and part.turn == 0 for part in found)
    room = TOKENS_SHOWN if single else EPISODE_SHOWN
    shown, hidden, before = [], 0, -1
    for part in found:
        many = 0 if part.author == "environment" else part.end - part.start
        if many and not room:
            hidden += many
            continue
        end = part.start + min(many, room) if many else part.end
        hidden, room = hidden + part.end - end, room - min(many, room)
        head = PLAIN if single else _head(part, columns, part.turn != before)
        before = part.turn
        mine = Part(part.turn, part.author, part.start, end)
        content = _content(mine, pieces, columns, full, calls=not single)
        shown.append({"who": known(part.author), **head, **content})
    turns = len({part.turn for part in found})
    return {"parts": shown, "hidden": hidden, "turns": 0 if single else turns}


def known(author: str) -> str:
    """An author as a style class; of whom nothing is known, text that was given."""
    return author if author in WHO else "data"


def parts(told: Sequence[tuple[int, str, int]], n: int) -> list[Part]:
    """The parts of n tokens; those that no part tells of are the student's."""
    found: list[Part] = []
    at = 0
    for turn, author, count in told:
        end = min(at + max(count, 0), n)
        if end > at:
            found.append(Part(turn, author, at, end))
        at = end
    if at < n:
        last = found[-1].turn if found else 0
        found.append(Part(last, "student", at, n))
    return found


def _head(part: Part, columns: Sequence[Sequence[float | None]], first: bool) -> dict[str, str]:
    """The heading of a part: the turn where it begins, who wrote, and of the student how far it is
    from the teacher there.
    """
    head = {**PLAIN, "author": WHO.get(part.author, clean(part.author))}
    if first:
        head["turn"] = f"turn {part.turn + 1}"
    if part.author == "student":
        pairs = zip(*(columns[i][part.start : part.end] for i in (2, 3)))
        gaps = [a - b for a, b in pairs if a is not None and b is not None]
        tokens = part.end - part.start
        head["tokens"] = f"{tokens} token{'s' if tokens > 1 else ''}"
        if gaps:
            head["kl"] = number(sum(gaps) / len(gaps))
    return head


def _content(
    part: Part,
    pieces: Sequence[str],
    columns: Sequence[Sequence[float | None]],
    full: float,
    calls: bool,
) -> dict[str, Any]:
    """Of the environment text, of all others tokens with their numbers; the student's calls of
    tools set apart, where there is somebody to call (`calls`).
    """
    if part.author == "environment":
        text = "".join(pieces[part.start : part.end])
        more = max(len(text) - OBSERVATION_SHOWN, 0)
        return {"text": framed(text[:OBSERVATION_SHOWN]), "more": more, "chunks": []}
    at = range(part.start, part.end)
    called = calls and part.author == "student"
    inside = set(_called([pieces[i] for i in at])) if called else set()
    chunks = [
        {"call": call, "tokens": [_token(pieces[i], [c[i] for c in columns], full) for i in chunk]}
        for call, chunk in groupby(at, key=lambda i: i - part.start in inside)
    ]
    return {"text": [], "more": 0, "chunks": chunks}


def _called(pieces: Sequence[str]) -> Iterator[int]:
    """Which of the pieces are of a tool call."""
    text = "".join(pieces)
    spans = [match.span() for match in CALL.finditer(text)]
    at = 0
    for index, piece in enumerate(pieces):
        while spans and spans[0][1] <= at:
            spans.pop(0)
        if spans and spans[0][0] < at + len(piece):
            yield index
        at += len(piece)


def framed(text: str) -> list[tuple[str, bool]]:
    """A text in pieces, and of each whether it is only what a template writes between turns."""
    return [(clean(piece), i % 2 == 1) for i, piece in enumerate(FRAME.split(text)) if piece]


def padded(values: Sequence[float | None] | None, n: int) -> list[float | None]:
    found = [v if finite(v) else None for v in values or []][:n]
    return found + [None] * (n - len(found))


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _token(piece: str, numbers: Sequence[float | None], full: float) -> dict[str, str]:
    """Text, colour class and the numbers of the tooltip. p5 is the fullest blue, n5 the fullest
    red.
    """
    credit, weight = numbers[:2]
    shade = 0
    if credit is not None and full:
        shade = max(-SHADES, min(SHADES, round(SHADES * credit / full)))
    classes = [f"p{shade}" if shade > 0 else f"n{-shade}"] if shade else []
    if weight == 0:
        classes.append("out")
    facts = "|".join("" if v is None else f"{v:.3g}" for v in numbers)
    text = clean(piece) or "∅"
    return {
        "text": text.replace("\n", "↵\n").replace("\t", "⇥\t"),
        "class": " ".join(classes),
        "facts": facts,
    }


def clean(text: str) -> str:
    """Text whose invisible, reordering and undecodable characters are shown as signs."""
    return CONTROL.sub(
        lambda match: chr(0x2400 + ord(match[0])) if match[0] < "\x20" else "�", text
    )
