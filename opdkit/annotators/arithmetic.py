"""Arithmetic that a text states, such as 12 + 30 = 42, checked exactly.

A parser of its own reads numbers, + - * / ^, parentheses and LaTeX's ways of writing them; nothing
is evaluated as a program, and what is not plainly arithmetic (letters, units between numbers,
rounding words) states nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 60  # tokens of one side
DIGITS = 30  # of a number
POWER, BITS = 64, 2_000  # the largest exponent, and the size of a power's base and value
DEPTH = 20  # parentheses in each other
ROUNDED = Fraction(1, 1000)  # relative: numbers with decimals on the left may be rounded themselves

_LEX = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"|(?P<fraction>\\[dt]?frac(?![A-Za-z]))|(?P<times>\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|[×·])"
    r"|(?P<over>\\div(?![A-Za-z])|[÷/])"
    r"|(?P<open>\\left\s*[(\[]|[(\[])|(?P<close>\\right\s*[)\]]|[)\]])"
    r"|(?P<equals>(?<![=<>!:≈~])=(?![=<>]))|(?P<sign>\*\*|[-+*^{}−%])|(?P<space>[ "
    r"\t]+|\\?[$€£]|\\[,;!:]|~)|(?P<word>\\?[A-Za-z][\w\\]*)|(?P<other>.|\n)",
    flags=re.DOTALL,
)
_NUMBER_NEXT = re.compile(r"\s*[\d$(]")
_SAME = {"−": "-", "**": "^"}
# before an expression or behind a result they make it another
_PARTS = """
of by over times plus minus divided multiplied added subtracted per from than to mod modulo sqrt
root log ln exp sin cos tan squared cubed percent half third quarter remainder choose and
hundred thousand million billion trillion dozen
"""
PARTS = frozenset(_PARTS.split())


@dataclass(frozen=True)
class Sign:
    """A token: its kind (number, word, other, or itself), its text and place."""

    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Claim:
    """Characters start:end say that two values are equal."""

    start: int
    end: int
    true: bool


def claims(text: str) -> Iterator[Claim]:
    """The equations of a text both of whose sides are arithmetic, in order: one side calculates, or
    the left one is the result of the equation before, as in 2 + 2 = 4 = 5.
    """
    if "=" not in text:
        return
    signs, result = list(_signs(text)), -1
    for i, sign in enumerate(signs):
        if sign.kind != "=":
            continue
        left, right = _side(signs, i, -1), _side(signs, i, 1)
        if not left or not right:
            continue
        if not (_works(left) or _works(right) or left[0].start == result):
            continue
        # a % is a hundredth or is left out: 20 / 80 * 100 = 25% is how people write it
        said = [
            _equal(a, b, left, right)
            for percent in (Fraction(1, 100), Fraction(1))
            if (a := _value(left, percent)) is not None
            and (b := _value(right, percent)) is not None
        ]
        if said:
            result = right[0].start
            yield Claim(left[0].start, right[-1].end, any(said))


def _signs(text: str) -> Iterator[Sign]:
    before = ""
    for found in _LEX.finditer(text):
        kind, said = str(found.lastgroup), found[0]
        if kind == "space":
            continue
        # 5 x 3
        crossed = said in ("x", "X") and before in ("number", ")")
        if crossed and _NUMBER_NEXT.match(text, found.end()):
            kind, said = "sign", "*"
        if kind in ("times", "over"):
            kind, said = "sign", "*" if kind == "times" else "/"
        if kind in ("open", "close"):
            kind, said = "sign", "(" if kind == "open" else ")"
        if kind in ("sign", "equals"):
            kind = said = _SAME.get(said, said)
        yield Sign(kind, said, found.start(), found.end())
        before = kind


def _side(signs: Sequence[Sign], at: int, step: int) -> list[Sign]:
    """The arithmetic before (-1) or behind (1) an equals sign; empty where what stands beside it
    makes it something else.
    """
    i = at + step
    while 0 <= i < len(signs) and signs[i].kind not in ("word", "other", "="):
        i += step
    run = list(signs[i + 1 : at] if step < 0 else signs[at + 1 : i])
    beside = signs[i] if 0 <= i < len(signs) else None
    # emphasis: **5 + 3 = 8**
    edge = 0 if step < 0 else -1
    while run and run[edge].text in ("^", "*"):
        run.pop(edge)
    if not run or len(run) > LONGEST:
        return []
    behind = signs[i + step] if 0 <= i + step < len(signs) else None
    return [] if beside is not None and _changes(beside, behind, run[edge], step) else run


def _changes(beside: Sign, behind: Sign | None, last: Sign, step: int) -> bool:
    """Whether a sign beside an expression makes it a part of something else.

    Arguments:
        behind: the one on its other side.
        last: the expression's own last sign towards it.
    """
    touches = beside.end == last.start if step < 0 else beside.start == last.end
    if beside.kind == "word":
        name = beside.text.lower()
        letter = len(name) == 1 and not (name == "a" and step < 0)
        if touches or letter or name.startswith("\\") or name in PARTS:
            return True
        # x - 3; 5 hours 30 minutes
        return (
            last.text in ("-", "+") if step < 0 else behind is not None and behind.kind == "number"
        )
    return beside.kind == "other" and touches and beside.text in "_^&|:!'\\?"


def _works(side: Sequence[Sign]) -> bool:
    """Whether a side calculates."""
    inner = [sign.kind for sign in side[1:]]
    return any(kind in ("+", "-", "*", "/", "^", "fraction") for kind in inner) or (
        side[0].kind == "fraction"
    )


def _equal(a: Fraction, b: Fraction, left: Sequence[Sign], right: Sequence[Sign]) -> bool:
    """Equal; a result with decimals up to its rounding, and numbers with decimals up to theirs."""
    if a == b:
        return True
    places = max((len(s.text.partition(".")[2]) for s in right if s.kind == "number"), default=0)
    near = abs(a - b)
    if places and near <= Fraction(1, 2 * 10**places):
        return True
    rounded = any("." in s.text for s in left if s.kind == "number")
    return rounded and near <= ROUNDED * max(abs(a), abs(b))


# -------------------------------------------------------------------------------------- its parser


class _NoValue(Exception):
    """It is no arithmetic, or too large."""


def _value(side: Sequence[Sign], percent: Fraction) -> Fraction | None:
    """percent: what a % multiplies by."""
    parser = _Parser(side, percent)
    try:
        value = parser.sum(0)
    except (_NoValue, ZeroDivisionError):
        return None
    return value if parser.at == len(side) else None


@dataclass
class _Parser:
    """Recursive descent: sum, product, power, atom."""

    signs: Sequence[Sign]
    percent: Fraction
    at: int = 0

    def _next(self) -> str:
        return self.signs[self.at].kind if self.at < len(self.signs) else ""

    def _take(self, kind: str) -> bool:
        taken = self._next() == kind
        self.at += taken
        return taken

    def _expect(self, kind: str) -> None:
        if not self._take(kind):
            raise _NoValue

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self._next() in ("+", "-"):
            minus = self._next() == "-"
            self.at += 1
            term = self._product(depth)
            value = _small(value - term if minus else value + term)
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._power(depth)
        while self._next() in ("*", "/"):
            over = self._next() == "/"
            self.at += 1
            factor = self._power(depth)
            value = _small(value / factor if over else value * factor)
        return value

    def _power(self, depth: int) -> Fraction:
        if self._next() in ("-", "+"):
            minus = self._next() == "-"
            self.at += 1
            value = self._power(depth + 1) if depth < DEPTH else _fail()
            return -value if minus else value
        base = self._atom(depth)
        if not self._take("^"):
            return base
        index = self._power(depth + 1) if depth < DEPTH else _fail()
        if index.denominator != 1 or abs(index) > POWER:
            raise _NoValue
        return _small(_small(base) ** int(index))

    def _atom(self, depth: int) -> Fraction:
        if depth >= DEPTH:
            raise _NoValue
        if self._take("("):
            value = self.sum(depth + 1)
            self._expect(")")
        elif self._take("{"):
            value = self.sum(depth + 1)
            self._expect("}")
        elif self._take("fraction"):
            if self._next() != "{":
                raise _NoValue
            top = self._atom(depth + 1)
            value = top / self._atom(depth + 1) if self._next() == "{" else _fail()
        elif self._next() == "number":
            text = self.signs[self.at].text.replace(",", "")
            if len(text) > DIGITS:
                raise _NoValue
            value = Fraction(text)
            self.at += 1
        else:
            raise _NoValue
        return value * self.percent if self._take("%") else value


def _fail() -> Fraction:
    raise _NoValue


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise _NoValue
    return value
