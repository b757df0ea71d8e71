"""The reward `math`: the final answer of a response, in words, numbers or LaTeX, equals
the row's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from opdkit.rewards.extract import (
    NUMBER,
    after_thinking,
    boxed,
    formula,
    hashed,
    last_number,
    stated,
    truth,
    truth_of,
)
from opdkit.rewards.guard import Guard, Guarded
from opdkit.rewards.quantity import clean, quantity
from opdkit.types import DataRow, Rollout

# characters of an expression that is handed to math-verify; a longer one counts as wrong
LONGEST = 400


@dataclass(frozen=True)
class Math(Guarded):
    r"""1.0 where the final answer equals row["answer"], else 0.0; cut responses are judged by what
    they contain.

    The final answer is the first of these that a response has, the last one of its kind:
    \boxed{...}; a line `#### ...`; "the answer is ..."; and then the last number (the last formula
    or line, where the truth is not a number). Expressions are compared by math-verify in a confined
    process: see docs/rewards.md. unprotected: also where none can be had.
    """

    unprotected: bool = False

    @property
    def guard(self) -> Guard:
        return Guard("math", "math", "Math", self.unprotected)

    def check_row(self, row: DataRow) -> None:
        truth_of(row, "math")

    def __call__(self, rollout: Rollout) -> float:
        return float(right(rollout.text, truth(rollout, "math"), self.guard))


GUARD = Math().guard


def right(text: str, answer: str, guard: Guard = GUARD) -> bool:
    """Whether a response's final answer is the given one. guard: who compares expressions."""
    text, answer = after_thinking(text), boxed(answer) or answer
    marked = boxed(text) or hashed(text)
    if marked is not None:
        return same(marked, answer, guard)
    numeric = quantity(answer) is not None
    said = stated(text)
    if said is None:
        return same(number_in(text) if numeric else formula_in(text), answer, guard)
    return same(said, answer, guard) or same(
        (leading(said) or number_in(said)) if numeric else formula_in(said), answer, guard
    )


def number_in(text: str) -> str:
    """The last number, or the whole last formula where no number follows it."""
    found = formula(text)
    if found and re.search(r"\d", found[0]) and not NUMBER.search(text, found[1]):
        return found[0].rpartition("=")[2]
    return last_number(text) or ""


def leading(said: str) -> str | None:
    """The number that a sentence begins with, as in "72 dollars for 3 friends"; None where it
    begins a formula.
    """
    found = NUMBER.match(said)
    return (
        found[0]
        if found and re.match(r"\s+[A-Za-z]{2,}|\s*[,;(]", said[found.end() :]) and "=" not in said
        else None
    )


def formula_in(text: str) -> str:
    """The last formula, or the last line."""
    found = formula(text)
    return found[0] if found else text.strip().rpartition("\n")[2]


def same(said: str, answer: str, guard: Guard = GUARD) -> bool:
    """Whether two answers mean the same: as text, as numbers, as a choice's letter, or as
    mathematics.
    """
    plain, wanted = _plain(said), _plain(answer)
    if not plain or plain == wanted:
        return bool(plain)
    a, b = quantity(said), quantity(answer)
    if a is not None and b is not None:
        return a.equals(b)
    if re.fullmatch(r"[a-j]", wanted):
        return _letter(said) == wanted
    said, answer = said.strip(" $*_`"), answer.strip(" $*_`")
    return max(len(said), len(answer)) <= LONGEST and _verified(guard, said, answer)


def _plain(text: str) -> str:
    """(B), \\text{B} and b are one."""
    return clean(text).replace(" ", "").casefold()


def _letter(said: str) -> str | None:
    """The letter of a choice: (B) 12, B. 12, B: 12."""
    found = re.match(r"\(([A-Ja-j])\)|([A-J])(?=[).:]|$)", clean(said))
    return (found[1] or found[2]).casefold() if found else None


@lru_cache(maxsize=4096)
def _verified(guard: Guard, said: str, answer: str) -> bool:
    return guard(answer, said) is True
