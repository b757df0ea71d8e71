"""Answers that are one number: 1,000 dollars, \\frac{1}{2}, 25%, 3\\frac{1}{2} cm, 4.5e33, 2^{10}.

What calculates is none: 2 + 3, 4 \\cdot 5, \\sqrt{9}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from math import comb, factorial

from opdkit.rewards.latex import spelt
from opdkit.rewards.units import named, unit

LONGEST = 100  # characters; a longer answer is no single number, but for one of digits alone
DIGITS = 2_000  # of such a one
TOLERANCE = Fraction(1, 10**6)  # of rounded decimals, such as 0.333333 for 1/3
BITS = 200_000  # of a power or factorial; of a larger one the value is not taken
MOST = 10_000  # of a factorial or binomial

SCALES = {
    "%": Fraction(1, 100),
    "dozen": Fraction(12),
    "hundred": Fraction(100),
    "thousand": Fraction(10**3),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}
# Words after a number that make it something else than a number of things: an expression, another
# value, another claim.
_NOT_UNITS = """
pi e i sqrt sin cos tan cot sec csc log ln exp mod modulo and or infinity plus minus divided
factorial choose half halves third thirds fourths fifths sixths sevenths eighths ninths tenth
tenths hundredth hundredths thousandth thousandths than not no nor never isn wrong incorrect
false untrue maybe perhaps possibly but most least if unless rather instead except too
"""
NOT_UNITS = frozenset(_NOT_UNITS.split())
CURRENCIES = {"$": "dollar", "€": "euro", "£": "gbp", "₹": "rupee", "¥": "yen"}
CURRENCIES |= {"us$": "dollar", "usd": "dollar", "eur": "euro", "gbp": "gbp", "chf": "chf"}
CURRENCIES |= {"rs": "rupee", "rs.": "rupee", "inr": "rupee", "jpy": "yen", "cad": "cad"}
CURRENCIES |= {"aud": "aud", "rmb": "rmb", "cny": "rmb"}

_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_INDEX = r"(?:\{\s*[-+]?\s*\d+\s*\}|\(-?\d+\)|-?\d+)"
_ATOM = (
    rf"(?:{_NUMBER}(?:\^{_INDEX}|\*\*\s*-?\d+|!)?|\(-{_NUMBER}\)\^{_INDEX}"
    r"|\\binom\s*(?:\{\d+\}|\d)\s*(?:\{\d+\}|\d))"
)
_TIMES_TEN = r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)"
_HEADS = [  # the first that matches a whole answer, its unit aside
    r"(?P<ones>\d*)\.(?P<tenths>\d*)(?:\\(?:overline|bar|dot)\s*\{(?P<again>\d+)\}"
    r"|\((?P<again2>\d+)\))",
    r"(?P<head>\d*\.\d*?)(?P<digit>\d)(?P=digit){2,}\\ldots",
    rf"(?P<factor>{_NUMBER}){_TIMES_TEN}\s*(?:\{{\s*(?P<ten>[-+]?\s*\d+)\s*\}}|\(?"
    r"(?P<ten2>[-+]?\d+)\)?)",
    rf"(?P<mantissa>{_NUMBER})[eE](?P<exponent>[-+]?\d+)",
    r"(?P<whole>\d+)\s*\\frac\s*(?:\{(?P<n1>\d+)\}|(?P<n2>\d))\s*(?:\{(?P<d1>\d+)\}|(?P<d2>\d))",
    r"(?P<whole2>\d+)\s+(?P<n3>\d+)\s*/\s*(?P<d3>\d+)",
    rf"\\frac\s*(?:\{{\s*(?P<top>-?\s*{_ATOM})\s*\}}|(?P<top2>\d))\s*"
    rf"(?:\{{\s*(?P<bottom>-?\s*{_ATOM})\s*\}}|(?P<bottom2>\d))",
    rf"(?P<top3>{_ATOM})\s*/\s*(?P<bottom3>{_ATOM})",
    rf"(?P<atom>{_ATOM})",
]
_WORD = r"[A-Za-z]+\.?(?:\s*\^\s*\{?[23]\}?|[23])?"
_SCALE = r"(?P<scale>\s*%|(?:\s+|-)(?:dozen|hundred|thousand|million|billion|trillion|percent)\b)"
_UNIT = rf"(?P<unit>\s*{_WORD}(?:[ /-]+{_WORD})*)"
_SIGN = r"(?P<sign>[-+]?)\s*"
_CURRENCY = re.compile(
    r"(?P<minus>[-+]?)\s*(?:(?P<sign>[A-Za-z]{0,2}\\?\$|[€£₹¥₩₽₺₱₫฿₪₦₴])"
    r"|(?P<code>(?:USD|EUR|GBP|CHF|INR|JPY|CAD|AUD|RMB|CNY|NZD|HKD|SGD|MXN|BRL|KRW|SEK|NOK|DKK|PLN|ZAR|Rs\.?)\b\.?)|\\(?P<name>pounds|euro))"
    r"\s*(?=[-+]?[\d.])"
)
_FORMS = [re.compile(rf"{_SIGN}{head}{_SCALE}?{_UNIT}?") for head in _HEADS]

_DROP = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:()\[\]]|\\(?=[$%])|\^\s*\\circ(?![a-z])"
    r"|\^\s*\{\s*\\circ\s*\}|\{(?=,\})|(?<=,)\}"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mathsf|mbox|operatorname\*?|rm|bf"
    r"|underline|boldsymbol|bm|emph)"
    r"\s*\{([^{}]*)\}"
)
_DEGREES = re.compile(
    r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:\\(?:text|mathrm)\s*)?\{?\s*([CF])\b\}?"
)
_ABOUT = re.compile(
    r"^(?:(?:about|approximately|approx\.?|roughly|around|exactly|only|just|a total of|is)\s+"
    r"|\\approx(?![a-z])\s*|\\sim(?![a-z])\s*|~\s*)+",
    flags=re.IGNORECASE,
)


@dataclass(frozen=True)
class Quantity:
    """amount x scale, of a unit. 25%: 25, 1/100, "". rounded: written with a decimal point, so
    perhaps not exact; work: a power, a factorial or a fraction not in lowest terms; reduced: no
    fraction that is a whole number; form: whole, decimal, fraction, percentage ...
    """

    amount: Fraction
    scale: Fraction = Fraction(1)
    unit: str = ""
    rounded: bool = False
    work: bool = False
    reduced: bool = True
    form: str = "whole"

    def equals(self, other: Quantity) -> bool:
        """25% is 25 and 0.25, but 7200% not 72; 3 million is 3000000 and also 3: the question may
        have named the scale.

        Units count where both are measures: 60 minutes are 1 hour, 5 cm is 5, but not 5 m.
        """
        a, b = unit(self.unit), unit(other.unit)
        if a is not None and b is not None and a != b:
            if a.dimensions != b.dimensions:
                return False
            mine, theirs = replace(self, unit=""), replace(other, unit="")
            return mine._near(mine.value * a.factor, theirs, theirs.value * b.factor)
        if self.scale == other.scale or 1 in (self.scale, other.scale):
            if self._near(self.amount, other, other.amount):
                return True
            percent, plain = (self, other) if self.scale < other.scale else (other, self)
            if percent.scale < 1 and plain.amount.denominator == 1 and abs(plain.amount) > 1:
                return False  # 7200% of what is 72?
        return self._near(self.value, other, other.value)

    @property
    def value(self) -> Fraction:
        return self.amount * self.scale

    def _near(self, a: Fraction, other: Quantity, b: Fraction) -> bool:
        """Equal; up to rounding where one is a decimal and neither is meant as a whole number."""
        if a == b or not (self.rounded or other.rounded) or a.denominator == b.denominator == 1:
            return a == b
        return abs(a - b) <= TOLERANCE * min(Fraction(1), max(abs(a), abs(b)))


def clean(text: str) -> str:
    """Without what LaTeX, Markdown and mathematical signs put around an answer."""
    text = spelt(text).strip()
    text = _DEGREES.sub(
        lambda found: f" degrees {'Celsius' if found[1] == 'C' else 'Fahrenheit'}", text
    )
    text = re.sub(r"~|\\ ", " ", text)
    text = _DROP.sub("", _TEXT.sub(r" \1 ", text))
    text = re.sub(r"\s+", " ", text).strip(" *_`").rstrip(".,;。 ")
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text.strip("$ ")
    alone = re.fullmatch(r"\(([^(),]*)\)|\{([^{},]*)\}|\[([^\[\],]*)\]|\\\{([^{},]*)\\\}", text)
    return (
        next((part.strip() for part in alone.groups() if part is not None), "") if alone else text
    )


def quantity(text: str) -> Quantity | None:
    """The number that a text is, or None where it is anything else: an expression, a list, a
    sentence.
    """
    if len(text) > LONGEST and not re.fullmatch(rf"\s*[-\d,.]{{1,{DIGITS}}}\s*", text):
        return None
    text = re.sub(r"(?<=\s)\(([A-Za-z ]+)\)$", r"\1", clean(text))  # 72 (in total)
    text, money = _money(_ABOUT.sub("", text))
    for form in _FORMS:
        found = form.fullmatch(text)
        if found is not None:
            break
    else:
        return None
    named_unit = _unit_of(found, money)
    if named_unit is None:
        return None
    parts = {name: value for name, value in found.groupdict().items() if value is not None}
    try:
        amount, work = _amount(parts)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    scale = SCALES.get(parts.get("scale", "").strip(" -").replace("percent", "%"), Fraction(1))
    number = found[0].partition(found["unit"])[0] if found["unit"] else found[0]
    fraction = bool({"top", "top2", "top3"} & parts.keys())
    return Quantity(
        -amount if parts["sign"] == "-" else amount,
        scale,
        named_unit,
        rounded="." in number and not {"again", "again2", "digit"} & parts.keys(),
        work=work,
        reduced=not fraction or amount.denominator > 1,
        form=_form(amount, scale, fraction or bool({"whole", "whole2"} & parts.keys())),
    )


def _form(amount: Fraction, scale: Fraction, fraction: bool) -> str:
    if scale < 1:
        return "percentage"
    if fraction:
        return "fraction"
    return "whole" if amount.denominator == 1 else "decimal"


def _money(text: str) -> tuple[str, str]:
    """The text without a currency in front or behind, and the currency."""
    after = re.fullmatch(r"(.*\d)\s*\\?([$€£₹¥₩₽₺₱₫฿₪₦₴])", text)
    found = _CURRENCY.match(f"{after[2]}{after[1]}" if after else text)
    if found is None:
        return text.replace("$", ""), ""
    text = found.string
    sign = (found["sign"] or found["code"] or found["name"]).replace("\\", "").lower()
    names = {"pounds": "gbp", "euro": "euro"}
    return found["minus"] + text[found.end() :], names.get(sign) or CURRENCIES.get(sign, sign)


def _unit_of(found: re.Match[str], money: str) -> str | None:
    """The unit, "" where there is none; None where what follows the number is no unit."""
    said = found["unit"] or ""
    words = re.findall(r"[A-Za-z]+", said)
    small = [word.lower() for word in words]
    if set(small) & NOT_UNITS or any(len(w) == 1 and named(w) is None for w in small):
        return None
    attached = said and not said[0].isspace()
    if (
        attached
        and not found["scale"]
        and (named(small[0]) is None or small[0] in ("am", "pm"))
        and small[0] not in ("mph", "kmh")
    ):
        return None  # 5x, 2sin
    return money or said.strip().lower()


def _amount(parts: dict[str, str]) -> tuple[Fraction, bool]:
    """The value, and whether its form may be reduced.

    Raises ValueError where it is too large to be taken.
    """
    if "again" in parts or "again2" in parts:
        again = parts.get("again") or parts["again2"]
        shift = Fraction(1, 10 ** len(parts["tenths"]))
        start = Fraction(f"{parts['ones'] or 0}.{parts['tenths'] or 0}")
        return start + shift * Fraction(int(again), 10 ** len(again) - 1), False
    if "digit" in parts:  # 0.333...
        start, places = _plain(f"{parts['head']}0"), len(parts["head"].partition(".")[2])
        return start + Fraction(int(parts["digit"]), 9 * 10**places), False
    if "factor" in parts:
        return _plain(parts["factor"]) * _ten(parts.get("ten") or parts["ten2"]), False
    if "mantissa" in parts:
        return _plain(parts["mantissa"]) * _ten(parts["exponent"]), False
    if "whole" in parts or "whole2" in parts:
        n, d = (
            int(next(parts[k] for k in keys if k in parts))
            for keys in (("n1", "n2", "n3"), ("d1", "d2", "d3"))
        )
        return int(parts.get("whole") or parts["whole2"]) + Fraction(n, d), False
    if "atom" in parts:
        return _atom(parts["atom"])
    (top, work), (bottom, more) = (
        _atom(next(parts[k] for k in keys if k in parts))
        for keys in (("top", "top2", "top3"), ("bottom", "bottom2", "bottom3"))
    )
    return top / bottom, work or more or (top / bottom).denominator != abs(bottom)


def _atom(text: str) -> tuple[Fraction, bool]:
    """A number, a power, a factorial or a binomial coefficient."""
    text = re.sub(r"\s", "", text)
    if text.startswith("\\binom"):
        n, k = (int(a or b) for a, b in re.findall(r"\{(\d+)\}|(\d)", text))
        if n > MOST:
            raise ValueError("too large")
        return Fraction(comb(n, k)), True
    negative = text.startswith("-")
    text = text.removeprefix("-").replace("**", "^")
    if text.endswith("!"):
        n = int(text[:-1])
        if n > MOST:
            raise ValueError("too large")
        value, work = Fraction(factorial(n)), True
    else:
        base, power, index = text.partition("^")
        value, work = _power(_plain(base.strip("()")), index), bool(power)
    return (-value if negative else value), work


def _power(base: Fraction, index: str) -> Fraction:
    exponent = int(index.strip("{}()").replace(" ", "") or 1)
    if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > BITS:
        raise ValueError("too large")
    return base**exponent


def _ten(index: str) -> Fraction:
    return _power(Fraction(10), index.replace(" ", ""))


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") or "0")
