"""Where in a response its final answer stands."""

from __future__ import annotations

import json
import re

from opdkit.base.errors import UserError
from opdkit.models.thoughts import THOUGHTS
from opdkit.types import Rollout

TAIL = 4_000  # characters at the end in which an answer without a box is sought
BOX = 2_000  # characters that a \\boxed{...} may span

# A number with sign, currency, fraction and percent sign. Not part of a word, a power, a longer
# number or a product such as 5x.
NUMBER = re.compile(
    r"(?<![\w.^\\])[-−+]?\\?[$€£]?[-−]?"
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"(?:\s*(?:\\times|\\cdot|[×·*x])\s*10(?:\s*\^\s*(?:\{[-+]?\d+\}|[-+]?\d+)|[⁻⁺⁰¹²³⁴-⁹]+))?"
    r"(?:\s*/\s*\d+)?(?:\s*\\?%)?(?!(?:st|nd|rd|th|[A-Za-z])\b|\d|\.\d|,\d{3}|[\^(⁰¹²³⁴-⁹])"
)
# "The answer is 5", "Final answer: 5", "**Answer:** 5", "answer = 5". What is said ends with its
# line or sentence.
_STATED = re.compile(
    r"\banswer\b(?P<bridge>[^\n.:=]{0,60}?)(?:\s(?:is|are|be)\b|[*_\s]*[:=])"
    r"[:*_\s]*(?P<said>(?:[^\n.]|\.(?=\S))+)",
    flags=re.IGNORECASE,
)
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", flags=re.DOTALL
)


# Where an answer has been given ...
_GIVEN = re.compile(
    r"\\f?box(?:ed)?\s*\{|</answer>|^####(?!#)[ \t]*\S.*$"
    r"|\banswer\b[^\n.:=]{0,60}?(?:is\b|[:=])[\s*_$\\(]*(?:[-\d]|[A-J]\b)",
    flags=re.IGNORECASE | re.MULTILINE,
)
# ... and where another question begins after it: a heading, the next turn of a chat, or a
# paragraph that asks.
_NEXT = re.compile(
    r"\n[#>*_\[({ \t]*(?:(?:next|new|another|follow-?up)\s+)?"
    r"(?:question|problem|exercise|task|query|user|human|instruction|input|student|prompt|q)"
    r"[ \t]*(?:[*_]*[ \t]*:|(?:\#|no\.?)?[ \t]*\d+[ \t]*(?:[*_]*[:.)\]]|$))"
    r"|\n[#*_ \t]*(?:next|new|another|follow-?up)\s+(?:question|problem|exercise|task)\b"
    r"|\n[ \t]*\n[ \t]*(?:what|which|who|how\s+(?:many|much|long|far|old))\b[^\n]*\?[ \t]*$"
    r"|\n[ \t]*\n[ \t]*(?:find|compute|calculate|determine|evaluate|simplify|solve)\s[^\n]*$"
    r"|\n[ \t]*(?:#+|\*\*)[ \t]*(?:question|problem|exercise|task|instruction|input|user)[ *_]*$"
    r"|<\|(?:im_start|im_end|end|eot_id|endoftext|end_of_text|user|start_header_id)\|>|</s>|<eos>"
    r"|<(?:start|end)_of_turn>|\[INST\]",
    flags=re.IGNORECASE | re.MULTILINE,
)


def truth(rollout: Rollout, reward: str) -> str:
    """The row's ground truth as text; a list of one is its element."""
    answer = rollout.row.get("answer")
    if answer is None:
        raise UserError(
            f"the reward {reward!r} compares responses with row['answer'], which is absent "
            f"(columns: {', '.join(rollout.row)}): use data with answers, name their column "
            "(columns={'answer': 'my_column'}), or use another reward"
        )
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    return listed(str(answer)) if isinstance(answer, str) else str(answer)


def listed(answer: str) -> str:
    """A ground truth written as a JSON list of texts, ["2"], without the list around it."""
    if not re.match(r"\[\s*[\"']", answer):
        return answer
    try:
        items = json.loads(answer if '"' in answer else answer.replace("'", '"'))
    except ValueError:
        return answer
    return ", ".join(map(str, items))


def after_thinking(text: str) -> str:
    """What a model says outside its thoughts: nothing where it never stopped thinking."""
    return outside_thoughts(text).strip()


def outside_thoughts(text: str) -> str:
    """The same with the white space around it.

    Before the end of a thought all is thought: its beginning may stand in the prompt.
    """
    for start, end in THOUGHTS:
        text = text.rpartition(end)[2].partition(start)[0]
    return text


def before_next(text: str) -> str:
    """A response up to where it goes on, after its answer, with another question or turn."""
    given = min((match.end() for match in _GIVEN.finditer(text)), default=len(text))
    after = _NEXT.search(text, given)
    return text[: after.start()] if after else text


def tagged(text: str) -> str | None:
    """What stands between the last <answer> and </answer>, or None."""
    end = text.lower().rfind("</answer>")
    start = text.lower().rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end].strip()


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} whose braces close, or None."""
    found = boxes(text)
    if found:
        return found[-1]
    alone = re.findall(r"\\boxed\s+([-+]?\w+(?:\.\d+)?)", text[-TAIL:])
    return alone[-1] if alone else None


def boxes(text: str) -> list[str]:
    r"""The contents of the last twenty \boxed{...} whose braces close; of a box in a box, the
    inner.
    """
    starts = [match.end() for match in re.finditer(r"\\f?box(?:ed)?\s*\{", text)]
    contents = (_braced(text, start) for start in starts[-20:])
    return [content for content in contents if content and not re.search(r"\\f?box", content)]


def _braced(text: str, start: int) -> str:
    """From a place on to where the brace before it closes; "" where it does not."""
    depth = 1
    # \{ and \} group nothing
    for brace in re.compile(r"\\.|[{}]").finditer(text, start, start + BOX):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[start : brace.start()].strip()
    return ""


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
    found = [
        match["said"].strip(" *_`")
        for match in _STATED.finditer(text[-TAIL:])
        if not re.search(r"\b(?:not|cannot|never)\b|n['’]t\b", match["bridge"])
    ]
    return next((said for said in reversed(found) if re.search(r"\w", said)), None)


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
