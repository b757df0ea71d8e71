"""What a reward gives besides its number: words about the response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 2_000  # characters that are kept


def split(value: Any) -> tuple[Any, str]:
    """The number and the words of what a reward gave: (0.0, "too short"), {"reward": 0.0,
    "feedback": "too short"}, an object with these two, or the number alone.
    """
    if isinstance(value, tuple) and len(value) == 2:
        number, words = value
    elif isinstance(value, Mapping) and "reward" in value:
        number, words = value["reward"], value.get("feedback")
    elif hasattr(value, "reward") and hasattr(value, "feedback"):
        number, words = value.reward, value.feedback
    else:
        number, words = value, None
    if not isinstance(words, str | None):
        return value, ""  # which is no number: an error says so
    return number, cut(words or "")


def cut(words: str) -> str:
    """The beginning and the end of words that are too long."""
    half = LONGEST // 2
    return words if len(words) <= LONGEST else f"{words[:half]} [...] {words[-half:]}"
