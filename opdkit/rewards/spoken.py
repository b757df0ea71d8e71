"""What a sentence claims: its number, or the letter of a choice."""

from __future__ import annotations

import re

from opdkit.rewards.extract import NUMBER, TAIL, formula
from opdkit.rewards.quantity import clean

# Just before a number or letter: "not 72", "less than 72", "5 or 6" name no value.
_DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|without|except|doubt|unlikely)\b|n['’]t\b)(?:\s+[^\W\d]+){0,3}\s*$"
    r"|\b(?:less|more|greater|fewer|larger|smaller|higher|lower|bigger|other|rather|older|younger)"
    r"\s+than(?:\s+[^\W\d]+){0,2}\s*$"
    r"|\b(?:at\s+(?:least|most)|up\s+to|over|under|above|below|beyond|exceeds?|between)"
    r"(?:\s+(?:about|a|an))?\s*$|\bbetween\b[^.;]*\d[^.;]{0,20}\band\s*$|\d\s?[–—]\s?$|\d-$|(?:[<>≤≥≠]|\\(?:le|ge|leq|geq|ne|neq|lt|gt))\s*$",
    flags=re.IGNORECASE,
)
_ANOTHER = re.compile(r"(?:\d|\b[A-J]\b)[^.;]{0,15}\bor\s+(?:[^\W\d]+\s+){0,2}[$*_(\\]*$")
# Just after it.
_DOUBTED = re.compile(
    r"\s*\S{0,12}?\s*[(,]?\s*\bor\s+(?:[^\W\d]+\s+){0,2}(?:[$\d]|[A-J]\b|more\b|less\b|fewer\b|so\b)"
    r"|\s*(?:\w+\s+)?at\s+(?:most|least)\b|\s*(?:\w+\s+)?(?:is|are|was|were|isn['’]t|would "
    r"be|seems)\s+(?:\w+\s+)?(?:wrong|incorrect|not|too)\b"
    r"|\s*[(,]?\s*(?:wrong|incorrect|false|maybe|perhaps|possibly)\b|\s*\?",
    flags=re.IGNORECASE,
)


# "Option B is correct.", "B is the answer."
_CHOSEN = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice)\s+[*_(]*([A-J])\b"
    r"|(?<![\w'])([A-J])\)?[*_]*\s+is\s+(?:the\s+)?(?:correct|right|best|answer|true)\b"
)


def claimed(text: str, *, leads: bool) -> str | None:
    """The number that a text ends with, or the last formula where no number follows it; None where
    the text only speaks of it.

    leads: a number that a sentence begins with counts before its last: "72 dollars for 3 friends".
    """
    start = NUMBER.match(text)
    if (
        leads
        and start
        and re.match(r"\s+[A-Za-z]{2,}|\s*[,;(]", text[start.end() :])
        and "=" not in text
    ):
        return _meant(text, start.start(), start.end())
    found = formula(text)
    if found and re.search(r"\d", found[0]) and not NUMBER.search(text, found[1]):
        value, end = found[0].rpartition("=")[2], found[1]
        at = text.rfind(found[0], 0, end)
        return None if _meant(text, at, end) is None else value
    numbers = list(NUMBER.finditer(text, max(0, len(text) - TAIL)))
    return _meant(text, numbers[-1].start(), numbers[-1].end()) if numbers else None


def letter(said: str) -> str | None:
    """The letter of a choice: (B) 12, B. 12, B: 12, "I think B."."""
    plain = clean(said)
    found = re.match(r"\(([A-Ja-j])\)|([A-J])(?=[).:]|$)", plain)
    if found:
        return None if _DOUBTED.match(plain, found.end()) else (found[1] or found[2]).casefold()
    named = [match for match in _CHOSEN.finditer(plain) if match[1] or match[2]]
    last = re.search(r"(?:^|[\s(*:])\(?([A-J])\)?$", plain) or (named[-1] if named else None)
    if last is None or len({match[1] or match[2] for match in named} | {last[last.lastindex]}) > 1:
        return None
    at = last.lastindex
    meant = _meant(plain, last.start(at), last.end(at))
    return meant and meant.casefold()


def _meant(text: str, start: int, end: int) -> str | None:
    """What stands at a place of a text, None where its words there deny it or name another too."""
    before = text[max(0, start - 80) : start]
    clause = re.split(r"[.;:\n](?=\s)|,\s", before)[-1]
    denied = any(_DENIED.search(words) for words in (clause, clause.rstrip(" $*_({\\")))
    other = _ANOTHER.search(before) or _DOUBTED.match(text[end : end + 60])
    return None if denied or other else text[start:end]
