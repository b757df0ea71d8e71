"""The reward `math`: the final answer of a response, in words, numbers or LaTeX, equals
the row's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from opdkit.rewards.extract import (
    NUMBER,
    after_thinking,
    before_next,
    boxed,
    boxes,
    formula,
    hashed,
    listed,
    stated,
    tagged,
    truth,
    truth_of,
)
from opdkit.rewards.forms import copied, finished, stands_in
from opdkit.rewards.guard import Guard, Guarded
from opdkit.rewards.interval import interval, is_interval
from opdkit.rewards.latex import spelt
from opdkit.rewards.quantity import clean, quantity
from opdkit.rewards.spoken import claimed, letter
from opdkit.types import DataRow, Rollout

# characters of an expression that is handed to math-verify; a longer one counts as wrong
LONGEST = 400
LONG = 10_000  # of any answer
# an answer in a base: 101_2
_BASED = re.compile(r"([-+]?[0-9][0-9A-Fa-f]*)_\{?(\d+)\}?")
# on the left of an answer's last "=": a name, a function's value, a calculation, or a sum, product
# or power of names (m+n = 204); not an equation
_NAMED = re.compile(
    r"(?!.*\d[A-Za-z(])[^+*/^<>-]*|[^A-Za-z]*"
    r"|[A-Za-z](?:_?\d+)?(?:\^\d+)?(?:[-+*]?[A-Za-z](?:_?\d+)?(?:\^\d+)?)*"
)
_CHOICE = re.compile(r"\s*(?:\([A-J]\)|[A-J][).:])[\s~]*(?=\S)")  # before its value: (B) 12
_APPROX = re.compile(r"\\approx(?![a-z])")


@dataclass(frozen=True)
class Math(Guarded):
    r"""1.0 where the final answer equals row["answer"], else 0.0; cut responses are judged by what
    they contain, and what stands in a thought is no answer.

    The final answer is the first of these that a response has, the last one of its kind:
    \boxed{...}; a line `#### ...`; <answer>...</answer>; "the answer is ..."; and then the last
    number (the last formula or line, where the truth is not a number). Where the truth is a number,
    so must be the answer: 123*456, \gcd(12, 18) and \sqrt{144} leave the work to be done, and a
    power or fraction that the question asks about does too. Other expressions are compared by
    math-verify in a confined process: see docs/rewards.md. unprotected: also where none can be had.
    """

    unprotected: bool = False

    @property
    def guard(self) -> Guard:
        return Guard("math", "math", "Math", self.unprotected)

    def check_row(self, row: DataRow) -> None:
        truth_of(row, "math")

    def __call__(self, rollout: Rollout) -> float:
        asked = question(rollout.row.get("prompt"))
        return float(right(rollout.text, truth(rollout, "math"), self.guard, asked))


GUARD = Math().guard


def question(prompt: Any) -> str:
    """A prompt as text: a string, or what the last message says."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("content")
    return prompt if isinstance(prompt, str) else ""


def right(text: str, answer: str, guard: Guard = GUARD, question: str = "") -> bool:
    """Whether a response's final answer is the given one.

    guard: who compares expressions. question: an expression that is copied from it is no answer.
    """
    text, answer = before_next(after_thinking(text)), listed(boxed(answer) or answer)
    tag = tagged(text)
    text = text if tag is None else tag
    marked = _boxed(text, answer) or hashed(text) or tag
    if marked is not None and same(marked, answer, guard, question):
        return True
    numeric = quantity(answer) is not None
    said = stated(text if marked is None else marked)
    # a sentence in <answer> claims a number if it names no other
    sentence = numeric and marked is tag is not None and len(set(NUMBER.findall(tag))) == 1
    if said is None and marked is not None and not sentence:
        return False
    whole = text if said is None and numeric and not NUMBER.search(text) else said  # a mere ½
    if whole is not None and same(whole, answer, guard, question):
        return True
    if numeric and said is not None and not re.search(r"\d", said):
        said, text = None, text.rpartition(said)[2]  # "The answer is as follows:"
    within = text if said is None else said
    found = claimed(within, leads=said is not None) if numeric else formula_in(within)
    return found is not None and same(found, answer, guard, question)


def _boxed(text: str, answer: str) -> str | None:
    """The last box; all boxes of its line where the answer is a list of as many."""
    several = "," in answer and quantity(answer) is None
    found = boxes(text.rstrip().rpartition("\n")[2]) if several else []
    return ", ".join(found) if len(found) == answer.count(",") + 1 > 1 else boxed(text)


def formula_in(text: str) -> str:
    """The last formula, or the last line."""
    found = formula(text)
    return found[0] if found else text.strip().rpartition("\n")[2]


def same(said: str, answer: str, guard: Guard = GUARD, question: str = "") -> bool:
    """Whether two answers mean the same: as text, as numbers, as a choice's letter, or as
    mathematics.
    """
    if len(said) > LONG:
        return False
    plain, wanted = _plain(said), _plain(answer)
    if not plain or plain == wanted:
        return bool(plain)
    bases = [_BASED.fullmatch(clean(text).replace(" ", "")) for text in (said, answer)]
    if any(bases):
        return _same_digits(bases, plain, wanted)
    number = quantity(answer)
    if number is not None:
        for side in sides(said):
            value = quantity(_CHOICE.sub("", clean(side)))
            if value is None or not value.equals(number):
                continue
            # 84/7 is no answer where 12 is, nor 3/8 to "Write 3/8 as a decimal"
            asked = (value.work or value.form != number.form) and stands_in(side, question)
            if not asked and (value.reduced or number.work):
                return True
        return False
    if re.fullmatch(r"[a-j]", wanted):
        return letter(said) == wanted
    return _same_expression(said.strip(" $*_`"), answer.strip(" $*_`"), guard, question)


def sides(said: str) -> list[str]:
    r"""What a text says the value is: what follows its last "=", before and after \approx."""
    said = spelt(said)
    parts = [part for part in _APPROX.split(said) if part.strip(" $")]
    out = []
    for part in parts:
        left, equals, value = part.rpartition("=")
        if not equals or _NAMED.fullmatch(re.sub(r"\\[a-z]+|[{}\\$\s]", "", left)):
            out.append(value)
    return out


def _same_digits(bases: list[re.Match[str] | None], plain: str, wanted: str) -> bool:
    r"""101_2 is 101 where the question names the base, not 101_3, nor 5."""
    digits = [b[1] if b else text for b, text in zip(bases, (plain, wanted), strict=True)]
    known = {b[2] for b in bases if b}
    return digits[0].casefold() == digits[1].casefold() and len(known) == 1


def _same_expression(said: str, answer: str, guard: Guard, question: str) -> bool:
    if max(len(said), len(answer)) > LONGEST or not finished(said, answer):
        return False
    said, answer = (re.sub(r"\\(?:left|right)(?![a-z])", "", spelt(x)) for x in (said, answer))
    if copied(said, question):
        return False
    if is_interval(answer) and (one := interval(_bare(said))) is not None:
        said = one
    elif is_interval(said) and (one := interval(_bare(answer))) is not None:
        answer = one
    return _verified(guard, said, answer)


def _bare(text: str) -> str:
    """An inequality without LaTeX's spaces."""
    return re.sub(r"\\[,;:! ]|[$]", " ", text)


def _plain(text: str) -> str:
    """(B), \\text{B} and b are one."""
    return clean(text).replace(" ", "").casefold()


@lru_cache(maxsize=4096)
def _verified(guard: Guard, said: str, answer: str) -> bool:
    return guard(answer, said) is True
