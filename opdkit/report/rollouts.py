"""Sample rollouts: what was asked, what was answered, and what it was worth; tokens are coloured by
credit, blue where the teacher likes a token more, red where less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.report.dialogue import SHADES, clean, dialogue, finite, framed, padded
from opdkit.report.numbers import number
from opdkit.report.read import RunData

PROMPT_SHOWN = 4000  # characters
FEEDBACK_SHOWN = 2000
# how a rollout ended, where it did not end itself
VERDICT = {"True": "right", "False": "wrong"}
FINISH = {
    "stop": "",
    "length": "cut at the length limit",
    "turns": "stopped at the limit of turns",
    "given": "read from the data",
}


def sample_steps(run: RunData) -> dict[str, Any]:
    """The rollouts of each shown step, and the credit that has the full colour: the 95th percentile
    of its size.
    """
    sizes = sorted(
        abs(c)
        for _, rollouts in run.samples
        for r in rollouts
        for c in r.get("credit") or []
        if finite(c)
    )
    full = sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0
    return {
        "full": number(full) if full else "",
        "shades": range(-SHADES, SHADES + 1),
        "steps": [(step, [_rollout(r, full) for r in rollouts]) for step, rollouts in run.samples],
    }


def _rollout(row: dict[str, Any], full: float) -> dict[str, Any]:
    pieces: list[str] = row.get("pieces") or []
    credits = [c for c in padded(row.get("credit"), len(pieces)) if c is not None]
    finish = str(row.get("finish") or "stop")
    return {
        "id": str(row.get("id", "")),
        "prompt": framed(readable(row.get("prompt"))[:PROMPT_SHOWN]),
        "text": "" if pieces else clean(str(row.get("text") or "")),
        "length": len(pieces),
        "reward": None if row.get("reward") is None else number(row["reward"]),
        "rewards": [(clean(str(n)), number(x)) for n, x in (row.get("rewards") or {}).items()],
        "verdict": VERDICT.get(str(row.get("correct")), ""),
        "feedback": framed(str(row.get("feedback") or "")[:FEEDBACK_SHOWN]),
        "credit": number(sum(credits) / len(credits)) if credits else None,
        "finish": FINISH.get(finish, clean(finish)),
        "truncated": finish == "length",
        **dialogue(row, full),
    }


def readable(prompt: Any) -> str:
    """A prompt as text; messages as `role: content`, a paragraph each."""
    if isinstance(prompt, list) and all(isinstance(message, Mapping) for message in prompt):
        said = [f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt]
        return "\n\n".join(said)
    return str(prompt or "")
