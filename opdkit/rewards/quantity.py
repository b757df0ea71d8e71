"""Answers that are one number: 1,000 dollars, \\frac{1}{2}, 25%, 3\\frac{1}{2} cm."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 100  # characters; a longer answer is no single number
TOLERANCE = Fraction(1, 10**6)  # of rounded decimals, such as 0.333333 for 1/3

SCALES = {
    "%": Fraction(1, 100),
    "dozen": Fraction(12),
    "hundred": Fraction(100),
    "thousand": Fraction(10**3),
}
SCALES |= {"million": Fraction(10**6), "billion": Fraction(10**9), "trillion": Fraction(10**12)}

MEASURES = frozenset(
    [
        "mm",
        "cm",
        "m",
        "km",
        "in",
        "ft",
        "yd",
        "mi",
        "mg",
        "g",
        "kg",
        "lb",
        "oz",
        "ml",
        "l",
        "s",
        "min",
        "h",
        "hr",
        "mph",
        "kmh",
    ]
)  # only these may differ from each other
NOT_UNITS = frozenset(
    [
        "pi",
        "e",
        "i",
        "sqrt",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "mod",
        "and",
        "or",
        "infinity",
    ]
)  # words that make an expression

_AMOUNT = r"(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<decimals>\.\d*)?"
_LATEX = r"(?:\\frac\s*(?:\{(?P<n1>-?\d+)\}|(?P<n2>\d))\s*(?:\{(?P<d1>\d+)\}|(?P<d2>\d)))"
_SLASH = r"(?:\s*/\s*(?P<over>\d+(?:\.\d+)?)|\s+(?P<n3>\d+)\s*/\s*(?P<d3>\d+))"
_WORD = r"[A-Za-z]+(?:\^?\{?[23]\}?|[²³])?"
_SCALE = r"(?P<scale>\s*%|(?:\s+|-)(?:dozen|hundred|thousand|million|billion|trillion|percent)\b)"
_UNIT = rf"(?P<unit>\s*{_WORD}(?:[ /]+{_WORD})*)"
_QUANTITY = re.compile(rf"(?P<sign>[-+]?)\s*{_AMOUNT}(?:\s*{_LATEX})?{_SLASH}?{_SCALE}?{_UNIT}?")

_DROP = re.compile(
    r"\\left|\\right|\\[!,;:()\[\]]|\\(?=[$%])|[$€£°]|\^\\circ|\^\{\\circ\}|\{(?=,\})|(?<=,)\}"
)
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


@dataclass(frozen=True)
class Quantity:
    """amount x scale, of a unit. 25%: 25, 1/100, ""."""

    amount: Fraction
    scale: Fraction = Fraction(1)
    unit: str = ""

    def equals(self, other: Quantity) -> bool:
        """25% is 0.25 and also 25, 3 million is 3000000 and also 3: the question may have named the
        scale.

        Units matter where both are measures: 5 cm is 5, not 5 m.
        """
        if self.unit != other.unit and {self.unit, other.unit} <= MEASURES:
            return False
        if (self.scale == other.scale or 1 in (self.scale, other.scale)) and _near(
            self.amount, other.amount
        ):
            return True
        return _near(self.amount * self.scale, other.amount * other.scale)


def _near(a: Fraction, b: Fraction) -> bool:
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= TOLERANCE * min(Fraction(1), max(abs(a), abs(b)))


def clean(text: str) -> str:
    """Without what LaTeX, Markdown and currencies put around an answer."""
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"~|\\ ", " ", text.replace("−", "-")))
    text = _DROP.sub("", _TEXT.sub(r" \1 ", text))
    text = re.sub(r"\s+", " ", text).strip(" *_`").rstrip(".,; ")
    alone = re.fullmatch(r"\(\s*([^(),]*?)\s*\)", text)
    return alone[1] if alone else text


def quantity(text: str) -> Quantity | None:
    """The number that a text is, or None where it is anything else: an expression, a list, a
    sentence.
    """
    if len(text) > LONGEST:
        return None
    found = _QUANTITY.fullmatch(clean(text))
    if (
        found is None
        or not any(found[name] for name in ("whole", "decimals", "n1", "n2"))
        or found["decimals"] == "."
    ):
        return None
    unit = (found["unit"] or "").strip().lower()
    attached = found["unit"] and not found["unit"][0].isspace()
    words = re.findall(r"[a-z]+", unit)
    if set(words) & NOT_UNITS or any(len(word) == 1 and word not in MEASURES for word in words):
        return None
    if attached and not found["scale"] and words[0] not in MEASURES:  # 5x, 2sin
        return None
    amount = _amount(found)
    if amount is None:
        return None
    scale = (found["scale"] or "").strip(" -")
    return Quantity(amount, SCALES.get(scale.replace("percent", "%"), Fraction(1)), unit)


def _amount(found: re.Match[str]) -> Fraction | None:
    amount = Fraction(
        f"{(found['whole'] or '0').replace(',', '')}{found['decimals'] or ''}".rstrip(".")
    )
    top, bottom = (
        found["n1"] or found["n2"] or found["n3"],
        found["d1"] or found["d2"] or found["d3"],
    )
    if top and (found["decimals"] or found["over"]):  # 1.5 1/2 is no number
        return None
    if top or found["over"]:
        divisor = Fraction(bottom or found["over"])
        if not divisor:
            return None
        amount = amount + Fraction(top) / divisor if top else amount / divisor
    return -amount if found["sign"] == "-" else amount
