"""Stated arithmetic is checked exactly; what is not plainly arithmetic states nothing."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from opdkit.annotators.arithmetic import claims


def said(text: str) -> list[tuple[str, bool]]:
    return [(text[c.start : c.end], c.true) for c in claims(text)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12 + 30 = 42", True),
        ("12 + 30 = 43.", False),
        ("So 3 × 4 = 12 apples", True),
        ("10/3 = 3.33", True),  # rounded to the digits that are written
        ("10/3 = 3.34", False),
        ("10 / 3 = 3", False),
        ("5 x 3 = 15", True),
        ("**5 + 3 = 9**", False),
        (r"\frac{1}{2} + \frac{1}{4} = \frac{3}{4}", True),
        (r"$2^{10} = 1024$", True),
        (r"3 \times (4 - 1) \div 3 = 3", True),
        ("20 / 80 = 25%", True),
        ("20 / 80 * 100 = 25%", True),
        ("$5 * 3 = $16", False),
        ("1,000 + 1 = 1,001", True),
        ("Total: -3 + 5 = 2", True),
        ("-2^2 = -4", True),
        ("2^-1 = 0.5", True),
        ("100 - 3 - 4 = 93", True),  # from left to right
        ("48 / 4 / 3 = 4", True),
    ],
)
def test_a_stated_equation_is_true_or_false(text: str, value: bool) -> None:
    assert [true for _, true in said(text)] == [value]


@pytest.mark.parametrize(
    "text",
    [
        "x + 3 + 4 = 8",
        "2x + 3 = 7",
        "x - 3 = 4",
        "f(2) = 5",
        "25% of 80 = 20",
        "half of 30 + 10 = 25",
        "330 / 60 = 5 hours 30 minutes",
        "7 / 2 = 3 R 1",
        "10:30 + 2 = 12:30",
        r"\sqrt{16} + 1 = 5",
        "2 hours = 120 minutes",
        "3 + 4 >= 5",
        "3 + 4 == 8",
        "1 / 0 = 3",
        "9^9^9^9 = 1",  # too large to be taken
        "2 + 2 = 5 thousand",
        "(" * 40 + "1" + ")" * 40 + " + 1 = 3",
        "1" * 40 + " + 1 = 2",
        "__import__('os').system('x') = 3",
        "5 = 7",  # nothing is calculated
    ],
)
def test_what_is_not_plainly_arithmetic_states_nothing(text: str) -> None:
    assert said(text) == []


def test_a_chain_states_each_of_its_equations() -> None:
    assert said("2 + 2 = 4 = 5") == [("2 + 2 = 4", True), ("4 = 5", False)]
    assert said("16 - 3 - 4 = 9 eggs. 9 * 2 = $17") == [
        ("16 - 3 - 4 = 9", True),
        ("9 * 2 = $17", False),
    ]


def test_random_expressions_have_pythons_value() -> None:
    """Texts and values are made together: + - * / and parentheses, over fractions."""
    rng = random.Random(0)

    def make(depth: int) -> tuple[str, Fraction]:
        if depth == 0:
            n = rng.randrange(1, 50)
            return str(n), Fraction(n)
        (a, x), (b, y) = make(depth - 1), make(rng.randrange(depth))
        sign = rng.choice("+-*/")
        if sign == "/" and y == 0:
            sign = "+"
        value = {"+": x + y, "-": x - y, "*": x * y}[sign] if sign != "/" else x / y
        return f"({a} {sign} {b})", value

    for _ in range(200):
        text, value = make(3)
        right = f"{value.numerator} / {value.denominator}"
        assert said(f"{text} = {right}") == [(f"{text} = {right}", True)]
        wrong = f"{text} = {value.numerator + 1} / {value.denominator}"
        assert [true for _, true in said(wrong)] == [False]
