"""Inequalities as the intervals that they are."""

from __future__ import annotations

import re

_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b|\\lor(?![a-z])|\\cup(?![a-z])")
_AND = re.compile(r"\\text\s*\{\s*and\s*\}|\band\b|\\land(?![a-z])")
_SUCH = re.compile(r"\s*\\\{\s*[A-Za-z](?:\s*\\in[^|:]*)?\s*(?:\||:|\\mid|\\colon)\s*(.*)\\\}\s*")
_SIGN = re.compile(r"(\\le(?![a-z])|\\ge(?![a-z])|<|>)")
_INTERVAL = re.compile(
    r"\s*[\[(][^\[\]()]*,[^\[\]()]*[\])]\s*(?:\\cup\s*[\[(][^\[\]]*,[^\[\]]*[\])]\s*)*"
)


def is_interval(text: str) -> bool:
    """Whether a text looks like (1, 3], or a union of such."""
    return bool(_INTERVAL.fullmatch(text))


def interval(text: str) -> str | None:
    r"""1 < x \\le 3 as (1,3], x \\ge 2 as [2,\\infty), a union for "or"; None where a text is
    anything else.
    """
    text = _SUCH.sub(r"\1", text)
    found = [_one(part) for part in _OR.split(text)]
    return None if None in found else r"\cup ".join(part for part in found if part)


def _one(text: str) -> str | None:
    if len(both := _AND.split(text)) == 2:
        return _both(*both)
    parts = [part.strip() for part in _SIGN.split(text)]
    if len(parts) == 3:
        left, sign, right = parts
        if not re.fullmatch(r"[A-Za-z]", left):
            left, sign, right = right, _turned(sign), left
        if not re.fullmatch(r"[A-Za-z]", left) or not right:
            return None
        if sign in (">", r"\ge"):
            return f"{'[' if sign != '>' else '('}{right},\\infty)"
        return f"(-\\infty,{right}{']' if sign != '<' else ')'}"
    if len(parts) != 5 or not re.fullmatch(r"[A-Za-z]", parts[2]):
        return None
    low, first, _, second, high = parts
    if first in (">", r"\ge"):
        low, first, second, high = high, _turned(second), _turned(first), low
    if {first, second} - {"<", r"\le"}:
        return None
    return f"{'(' if first == '<' else '['}{low},{high}{')' if second == '<' else ']'}"


def _both(one: str, other: str) -> str | None:
    """x > 1 and x < 3: what bounds one variable from below and from above."""
    first, second = _one(one), _one(other)
    if first and second and second.endswith(r",\infty)"):
        first, second = second, first
    names = {re.sub(r"[^A-Za-z]", "", _SIGN.sub("", part)) for part in (one, other)}
    below, above = r",\infty)", r"(-\infty,"
    if not (first and second and len(names) == 1):
        return None
    if not (first.endswith(below) and second.startswith(above)):
        return None
    return f"{first.removesuffix(below)},{second.removeprefix(above)}"


def _turned(sign: str) -> str:
    return {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[sign]
