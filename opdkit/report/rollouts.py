"""Sample rollouts with their tokens coloured by credit: blue where the teacher likes a token more,
red where less.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from opdkit.report.numbers import number
from opdkit.report.read import RunData

TOKENS_SHOWN = 500  # of one rollout
PROMPT_SHOWN = 4000  # characters
SHADES = 5  # of each colour

# Not allowed in HTML, or able to reorder or hide the text around them; shown as a visible sign
# instead.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def sample_steps(run: RunData) -> dict[str, Any]:
    """The rollouts of each shown step, and the credit that has the full colour: the 95th percentile
    of its size.
    """
    sizes = sorted(
        abs(c)
        for _, rollouts in run.samples
        for r in rollouts
        for c in r.get("credit") or []
        if _finite(c)
    )
    full = sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0
    return {
        "full": number(full) if full else "",
        "shades": range(-SHADES, SHADES + 1),
        "steps": [(step, [_rollout(r, full) for r in rollouts]) for step, rollouts in run.samples],
    }


def _rollout(row: dict[str, Any], full: float) -> dict[str, Any]:
    pieces: list[str] = row.get("pieces") or []
    columns = [
        _padded(row.get(name), len(pieces)) for name in ("credit", "weight", "logp", "teacher_logp")
    ]
    credits = [c for c in columns[0] if c is not None]
    return {
        "id": str(row.get("id", "")),
        "prompt": clean(str(row.get("prompt") or ""))[:PROMPT_SHOWN],
        "text": "" if pieces else clean(str(row.get("text") or "")),
        "tokens": [
            _token(piece, numbers, full)
            for piece, *numbers in list(zip(pieces, *columns))[:TOKENS_SHOWN]
        ],
        "hidden": max(0, len(pieces) - TOKENS_SHOWN),
        "length": len(pieces),
        "reward": None if row.get("reward") is None else number(row["reward"]),
        "credit": number(sum(credits) / len(credits)) if credits else None,
        "truncated": row.get("finish") == "length",
    }


def _padded(values: Sequence[float | None] | None, n: int) -> list[float | None]:
    found = [v if _finite(v) else None for v in values or []][:n]
    return found + [None] * (n - len(found))


def _finite(value: Any) -> bool:
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
