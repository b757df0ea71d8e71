"""What stands in front of reasoning-gym's scorers, some of which pay for what is no right answer.

Each check belongs to a task and gives the score itself, or None where the library's scorer is to
be asked.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Entry = dict[str, Any]
FORM = 0.05  # what countdown's own scorer pays for an expression that is not the answer
MOST = 0.9  # for what is not equal to the answer of a task of `EQUAL`
ARITHMETIC = 400  # characters of an expression of numbers
# words that a float may be spelt with: NaN is equal to nothing, so no difference from it is large
NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf|infinity)[ij]?(?![a-z])", flags=re.IGNORECASE)
NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
NONE = ("", "none", "no solution", "no solutions", "no real solution", "no real solutions", "[]")
# Tasks that add up credit letter by letter or word by word, up to 1 for an answer that goes on
# after the right one, or has only the first ten letters of a long word.
EQUAL = ("figlet_font", "letter_jumble", "spell_backward", "word_sorting")
OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def scored(task: str, said: str, entry: Entry, scorer: Any) -> float:
    """The score of an answer. scorer: the task's own, of the library."""
    gold = str(entry["answer"] or "")
    if NO_NUMBER.search(said) and not NO_NUMBER.search(gold):
        return 0.0
    if task in CHECKS:
        value = CHECKS[task](said, entry, scorer)
        if value is not None:
            return value
    value = float(scorer.score_answer(said, entry))
    if task in EQUAL and _letters(said) != _letters(gold):
        return min(value, MOST)
    return value


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


def _words(said: str, entry: Entry, scorer: Any) -> float:
    """The scorer of game_of_life_halting compares bool("False"), which is true, with itself."""
    return float(_letters(said) == _letters(entry["answer"]))


def _puzzle(target: str | int) -> Callable[[str, Entry, Any], float]:
    """All the numbers given, each once, joined by + - * / to the target exactly.

    target: the value, or the name under which the entry holds it.
    """

    def check(said: str, entry: Entry, scorer: Any) -> float:
        known = entry["metadata"]
        wanted = known[target] if isinstance(target, str) else target
        left, _, right = said.translate(str.maketrans("×÷−", "*/-")).partition("=")
        if right.strip() not in ("", str(wanted)):
            return 0.0
        found = arithmetic(left)
        if found is None:
            return 0.0
        value, numbers = found
        same = sorted(numbers) == sorted(known["numbers"])
        return 1.0 if same and value == wanted else FORM

    return check


def arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression of whole numbers, + - * / and parentheses, and its numbers; None
    where a text is anything else.
    """
    text = text.strip()
    if len(text) > ARITHMETIC or not re.fullmatch(r"[\d\s+\-*/()]+", text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        numbers = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        return _value(tree.body), [n for n in numbers if isinstance(n, int)]
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only + - * / are arithmetic here")


def _probability(said: str, entry: Entry, scorer: Any) -> float:
    """Within 0.0001 and one in a hundred: the scorer pays "0" for every probability, as the first
    digits of it.
    """
    try:
        value, wanted = Fraction(said.replace(",", "")), Fraction(entry["answer"].replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(abs(value - wanted) <= min(Fraction(1, 10**4), abs(wanted) / 100))


def _roots(said: str, entry: Entry, scorer: Any) -> float | None:
    """An equation without real solutions: the scorer pays for any text without a number."""
    return None if NUMBER.search(entry["answer"]) else float(said.strip(" .").casefold() in NONE)


def _one_number(said: str, entry: Entry, scorer: Any) -> float:
    """The scorer of gsm_symbolic takes the first number, without its sign and up to a comma."""
    numbers = NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", said))
    return float(len(numbers) == 1 and Fraction(numbers[0]) == Fraction(str(entry["answer"])))


def _complex(said: str, entry: Entry, scorer: Any) -> float | None:
    """Only what a complex number is written with is read as one."""
    return None if re.fullmatch(r"[-+0-9.eEiIjJ()*\s]+", said) else 0.0


def _sentences(said: str, entry: Entry, scorer: Any) -> float | None:
    """A statement of the question, "if Ann is a knight then Bo is a knave", is no solution."""
    return 0.0 if re.search(r"\b(?:if|then|or|not|only)\b", said) else None


def _conclusion(said: str, entry: Entry, scorer: Any) -> float | None:
    """What one premise gives alone, or all those that are letters, is copied from the question, and
    so is what holds a premise. Premises that contradict each other give everything.
    """
    from reasoning_gym.logic.propositional_logic import Expression, Operator

    def copied(part: Any) -> bool:
        if part.operator == Operator.AND:
            return copied(part.left) and copied(part.right)
        return any(scorer._is_valid_conclusion(given, part) for given in alone)

    if not re.fullmatch(r"[A-Z¬∧∨→↔()\s]+", said):
        return 0.0
    try:
        concluded = Expression.from_string(said)
        premises = [Expression.from_string(text) for text in entry["metadata"]["premises"]]
        compound = {str(premise) for premise in premises if premise.operator is not None}
        letters = [premise for premise in premises if _letter(premise)]
        alone = [letters, *([premise] for premise in premises)]
        letter = Expression(None, entry["metadata"]["variables"][0])
        all_follows = all(
            scorer._is_valid_conclusion(premises, one)
            for one in (letter, Expression(Operator.NOT, letter))
        )
        same = compound & _parts(concluded) or copied(concluded)
        return 0.0 if all_follows or same else None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return 0.0


def _letter(premise: Any) -> bool:
    """P, or ¬P."""
    left = premise.left
    return premise.operator is None or (
        premise.right is None and (isinstance(left, str) or left.operator is None)
    )


def _parts(expression: Any) -> set[str]:
    """An expression of logic and all that it is made of, as texts."""
    if not hasattr(expression, "operator"):
        return set()
    return {str(expression)} | _parts(expression.left) | _parts(expression.right)


CHECKS: dict[str, Callable[[str, Entry, Any], float | None]] = {
    "coin_flip": _probability,
    "complex_arithmetic": _complex,
    "countdown": _puzzle("target"),
    "game_of_life_halting": _words,
    "gsm_symbolic": _one_number,
    "knights_knaves": _sentences,
    "polynomial_equations": _roots,
    "propositional_logic": _conclusion,
    "puzzle24": _puzzle(24),
}
