"""One spelling of what answers write in several: signs of Unicode, commands of LaTeX."""

from __future__ import annotations

import re
import unicodedata

_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "∕": "/",
    "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ",
    "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "…": r"\ldots ", "°": r"^\circ ", "，": ",",
    "¢": " cents ", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_COMMANDS = [
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\[dt]binom(?![a-z])", r"\\binom"),
    (r"\\(?:leqslant|leq)(?![a-z])", r"\\le"),
    (r"\\(?:geqslant|geq)(?![a-z])", r"\\ge"),
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=|\\neq(?![a-z])", r"\\ne "),
    (r"\\(?:varnothing|O|\{\s*\\\})(?![a-z])", r"\\emptyset "),
    (r"\\(?:approxeq|simeq|doteq|thickapprox)(?![a-z])", r"\\approx"),
    (r"\\(?:dots|cdots|dotsc)(?![a-z])", r"\\ldots"),
    (r"(?<=\d)\s*\\ldots|(?<=\d)\.\.\.+", r"\\ldots"),
    (r"\\(?:text)?color\s*\{[^{}]*\}", " "),
    (r"\{([^{}\\]+)\\over(?![a-z])([^{}\\]+)\}", r"\\frac{\1}{\2}"),
    (r"(?<!\d)(\d{1,40})\s*\\over(?![a-z])\s*(\d+)", r"\\frac{\1}{\2}"),
    (r"\\(?:tiny|small|large|Large|LARGE|huge|Huge)(?![a-z])", " "),
    (r"\\(?:displaystyle|textstyle|limits|quad|qquad|hfill|bigl?|bigr?)(?![a-z])", " "),
]


def spelt(text: str) -> str:
    r"""x² is x^{2}, √2 \sqrt{2}, ½ \frac{1}{2}, × \times, ≤ \le."""
    if not text.isascii():
        text = re.sub(
            r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda found: "^{" + found[0].translate(_SUPER) + "}", text
        )
        text = re.sub(r"[₀-₉]+", lambda found: "_{" + found[0].translate(_SUB) + "}", text)
        text = re.sub(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\w))", _root, text)
        text = "".join(_sign(letter) for letter in text)
    for pattern, instead in _COMMANDS:
        text = re.sub(pattern, instead, text)
    return text


def _root(found: re.Match[str]) -> str:
    return rf"\sqrt{{{found[1] or found[2] or found[3]}}}"


def _sign(letter: str) -> str:
    """A sign's LaTeX; ½ as a fraction, digits of other widths and scripts as ours."""
    if letter in _SIGNS:
        return _SIGNS[letter]
    if letter.isascii():
        return letter
    parts = unicodedata.normalize("NFKC", letter).partition("⁄")
    if parts[1] and parts[2].isdigit():
        return rf"\frac{{{parts[0]}}}{{{parts[2]}}}"
    if letter.isdecimal():
        return str(unicodedata.decimal(letter))
    return parts[0] if len(parts[0]) == 1 and parts[0].isascii() else letter
