"""Which expressions are answers, and which leave the work to whoever compares them."""

from __future__ import annotations

import re

from opdkit.rewards.quantity import clean

# What asks for a calculation. An answer holds it only where the ground truth does: \int_0^1 2x dx
# is no answer where 1 is.
WORK = {
    "int": r"\\i*o?i*int(?![a-z])|\bIntegral\b|\bintegrate\b",
    "sum": r"\\sum(?![a-z])|\bSum\b",
    "prod": r"\\prod(?![a-z])",
    "lim": r"\\lim(?:sup|inf)?(?![a-z])|\blim\b|\blimit\b",
    "gcd": r"\bgcd\b|\\gcd|\blcm\b|\\lcm",
    "extreme": r"\\?\b(?:max|min|sup|inf|argmax|argmin)\b",
    "det": r"\\det(?![a-z])|\bdet\b|\\begin\{vmatrix\}",
    "mod": r"\\[bp]?mod(?![a-z])|\bmod\b",
    "derivative": r"\\frac\s*\{\s*d[^{}]*\}\s*\{\s*d|\\partial|\bd/d[a-z]\b",
    "tower": r"\d\s*\^\s*\{?\s*\d+\s*\^",  # 9^{9^{9}}: no computer writes it out
    "rounding": r"\\[lr](?:floor|ceil)(?![a-z])|\b(?:floor|ceil)\b",
}
# What the value of a constant is not written with, unless the ground truth is.
CONSTANT = {
    "log": r"\\?\b(?:log|ln|lg|exp)(?![a-z])",
    "trigonometric": r"\\?\b(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![a-z])",
    "absolute": r"\||\\[lr]?vert",
    "matrix": r"\\begin",
    "factorial": r"!|\\binom",
}
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-DF-HJ-Za-df-hj-z](?![A-Za-z])")
_OPERATES = re.compile(
    r"[+*/^!|]|.-|\\(?:frac|sqrt|times|cdot|div|binom|[a-z]+(?=\s*[({\d_^\\]))|\)\s*\("
)


def finished(said: str, answer: str) -> bool:
    """Whether an expression, not a number, leaves no more to be calculated than the answer does."""
    kinds = WORK if varies(answer) else {**WORK, **CONSTANT}
    return all(
        re.search(pattern, answer) or not re.search(pattern, said) for pattern in kinds.values()
    )


def varies(text: str) -> bool:
    """Whether an expression has a variable."""
    return bool(_VARIABLE.search(re.sub(r"\\(?:text|mathrm)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text)))


def copied(said: str, question: str) -> bool:
    """Whether an expression that calculates stands in the question itself."""
    return bool(_OPERATES.search(clean(said))) and stands_in(said, question)


def stands_in(said: str, question: str) -> bool:
    """Whether a question has an expression, as a whole and not as a part of a larger one."""
    sought = _bare(said)
    if not question or not sought:
        return False
    whole = rf"(?<![\d.+\-*/^_{{(\\=]){re.escape(sought)}(?![\d*/^_{{+\-!)]|\.\d)"
    return re.search(whole, _bare(question)) is not None


def _bare(text: str) -> str:
    """A text without what does not change an expression."""
    text = re.sub(r"\\(?:cdot|times|ast)(?![a-z])", "*", clean(text))
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"[\s$]|\\[,;:! ]", "", text)).casefold()
