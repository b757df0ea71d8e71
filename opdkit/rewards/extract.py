"""Where in a response its final answer stands."""

from __future__ import annotations

import re

from opdkit.base.errors import UserError
from opdkit.types import DataRow, Rollout

TAIL = 4_000  # characters at the end in which an answer without a box is sought
BOX = 2_000  # characters that a \\boxed{...} may span

# A number with sign, currency, fraction and percent sign. Not part of a word, a power, a longer
# number or a product such as 5x.
NUMBER = re.compile(
    r"(?<![\w.^\\])[-−+]?\\?[$€£]?[-−]?"
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?(?:\s*\\?%)?"
    r"(?!(?:st|nd|rd|th|[A-Za-z])\b|\d|\.\d|,\d{3}|[\^(])"
)
# "The answer is 5", "Final answer: 5", "**Answer:** 5", "answer = 5". What is said ends with its
# line or sentence.
_STATED = re.compile(
    r"\banswer\b[^\n.:=]{0,60}?(?:\s(?:is|are|be)\b|[*_\s]*[:=])"
    r"[:*_\s]*(?P<said>(?:[^\n.]|\.(?=\S))+)",
    flags=re.IGNORECASE,
)
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", flags=re.DOTALL
)


def truth(rollout: Rollout, reward: str) -> str:
    """The ground truth of a rollout's row as text."""
    return truth_of(rollout.row, reward)


def truth_of(row: DataRow, reward: str) -> str:
    """A row's ground truth as text."""
    answer = row.get("answer")
    if answer is None or not str(answer).strip():
        raise UserError(
            f"the reward {reward!r} compares responses with row['answer'], which is "
            f"{'absent' if answer is None else 'blank'} (columns: {', '.join(row)}): use data with "
            "answers, name their column (columns={'answer': 'my_column'}), or use another reward"
        )
    return str(answer)


def after_thinking(text: str) -> str:
    """What follows the model's thinking; everything where it never stopped, or then said
    nothing.
    """
    return text.rpartition("</think>")[2].strip() or text


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} whose braces close, or None."""
    starts = [match.end() for match in re.finditer(r"\\f?box(?:ed)?\s*\{", text)]
    for start in reversed(starts[-20:]):
        depth = 1
        # \{ and \} group nothing
        for brace in re.compile(r"\\.|[{}]").finditer(text, start, start + BOX):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                return text[start : brace.start()].strip() or None
    return None


def hashed(text: str) -> str | None:
    """What follows the last `####` (GSM8K) whose line is the text's last or holds only a number;
    others are headings.
    """
    lines = text[-TAIL:].rstrip().splitlines()
    for line in reversed(lines):
        found = re.fullmatch(r"\s*####(?!#)\s*(\S.*?)\s*", line)
        if found and (line is lines[-1] or NUMBER.fullmatch(found[1])):
            return found[1]
    return None


def stated(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", to the end of its sentence."""
    found = [match["said"].strip(" *_`") for match in _STATED.finditer(text[-TAIL:])]
    return next((said for said in reversed(found) if said), None)


def formula(text: str) -> tuple[str, int] | None:
    r"""The content of the last $...$, $$...$$, \(...\) or \[...\], and where in the text it
    ends.
    """
    found = list(_FORMULA.finditer(text, max(0, len(text) - TAIL)))
    return (found[-1][found[-1].lastindex or 0].strip(), found[-1].end()) if found else None


def last_number(text: str) -> str | None:
    """The last number of a text."""
    found = NUMBER.findall(text[-TAIL:])
    return found[-1] if found else None
