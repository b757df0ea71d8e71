"""What a library may evaluate as Python of an answer: numbers, lists of them, and elementary
functions. Nothing else is run.

Several scorers hand an answer to Python's `eval`, some by way of sympy's `parse_expr`:
`__import__('os').system('...')` is an answer too.
"""

from __future__ import annotations

import ast
import builtins
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

LONGEST = 20_000  # characters
# Python's own modules evaluate texts of their own, such as namedtuple's
OWN = sys.stdlib_module_names
# What an answer may call of sympy's: what its parser writes around numbers and names, and the
# functions of school mathematics.
FUNCTIONS = """
Add Mul Pow Integer Float Rational Symbol Function sqrt cbrt root exp log ln Abs sign factorial
binomial floor ceiling Max Min sin cos tan cot sec csc asin acos atan acot asec acsc atan2 sinh cosh
tanh coth sech csch asinh acosh atanh acoth erf erfc erfi gamma lowergamma uppergamma Ei Si Ci li Li
fresnels fresnelc LambertW elliptic_e elliptic_f polylog Heaviside
"""
CALLED = frozenset(FUNCTIONS.split())
NAMED = frozenset(("pi", "E", "I", "oo", "zoo", "nan"))
LITERALS = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load)
ARITHMETIC = (
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)


class NotArithmetic(ValueError):
    """A text that an answer may not have evaluated."""


def checked(text: Any, names: Mapping[str, Any]) -> str:
    """The text, where it is arithmetic. names: what the evaluating library gave the answer's own
    letters a meaning by.

    Raises NotArithmetic for attributes, subscripts, lambdas, comprehensions, formatted strings,
    assignments, and calls of anything but `CALLED`; SyntaxError for what is no expression.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise NotArithmetic("only a text of at most 20,000 characters is evaluated")
    tree = ast.parse(text.strip(), mode="eval")
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) and not _named_function(node.func):
                raise NotArithmetic("an answer may call functions of mathematics only")
        elif isinstance(node, ast.Name):
            known = CALLED if id(node) in functions else CALLED | NAMED
            if node.id not in known and not _harmless(names.get(node.id)):
                raise NotArithmetic(f"an answer may not use {node.id!r}")
        elif not isinstance(node, (*LITERALS, *ARITHMETIC, ast.keyword)):
            raise NotArithmetic(f"an answer may not hold a Python {type(node).__name__}")
    return text


def _named_function(node: ast.expr) -> bool:
    """Function('f')(x), as sympy's parser writes an unknown f(x)."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Function"
    )


def _harmless(value: Any) -> bool:
    """A letter that the library itself declared: a symbol."""
    return type(value).__module__.startswith("sympy.") and type(value).__name__ in (
        "Symbol",
        "Dummy",
    )


def only_arithmetic() -> None:
    """From now on, and for the rest of this process's life, `eval` runs arithmetic only and `exec`
    nothing but libraries' own texts.
    """
    builtins.eval, builtins.exec = _eval(builtins.eval), _exec(builtins.exec)


def _caller() -> str:
    return str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0]


def _eval(plain: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(text: Any, globals: Any = None, locals: Any = None) -> Any:
        if _caller() in OWN:
            return plain(text, *_scope(sys._getframe(1), globals, locals))
        names = {**(globals or {}), **(locals or {})}
        return plain(checked(text, names), {**names, "__builtins__": {}})

    return evaluate


def _exec(plain: Callable[..., Any]) -> Callable[..., Any]:
    def execute(code: Any, globals: Any = None, locals: Any = None, **more: Any) -> None:
        # of sympy, texts that it made of an expression already read
        if _caller() not in (*OWN, "sympy"):
            raise NotArithmetic("an answer is not run as a program")
        plain(code, *_scope(sys._getframe(1), globals, locals), **more)

    return execute


def _scope(frame: types.FrameType, globals: Any, locals: Any) -> tuple[Any, Any]:
    """The names that Python's own eval and exec would use, called from that frame."""
    if globals is None:
        return frame.f_globals, frame.f_locals if locals is None else locals
    return globals, globals if locals is None else locals
