"""The expressions that spell methods: names with arguments, joined by * and +.

Nothing in them is executed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

from opdkit.base.errors import UserError, shown

# file.py:function, inside an expression
ADDRESS = re.compile(r"""[^\s*+(),="']+\.py:[A-Za-z_]\w*""")
HIDDEN = "address_in_expression_"
EXAMPLE = (
    "write for example 'tropd(k=32) * iw_opd(gamma=1)' or '0.5 * opd + gkd', in quotes on the "
    "command line"
)


def is_expression(text: str) -> bool:
    """Whether a text spells more than a method's name."""
    return any(sign in text for sign in "*+(")


def evaluate(text: str, leaf: Callable[..., Any]) -> Any:
    """The value of an expression: `leaf(name, **arguments)` for each method, joined by * and +.

    Nothing in it is executed.
    """
    tree, addresses = parse(text)

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Add)):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Mult):
                return left * right
            if not any(isinstance(x, (int, float)) for x in (left, right)):
                return left + right
            raise UserError(
                f"in {shown(text)} a number is added to a method: numbers multiply; write '0.5 * "
                "opd + gkd'"
            )
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.Name):
            return leaf(addresses.get(node.id, node.id))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.args or any(k.arg is None for k in node.keywords):
                raise UserError(
                    f"in {shown(text)} the arguments of {node.func.id} must be given by name: "
                    f"{EXAMPLE}"
                )
            names = [str(k.arg) for k in node.keywords]
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(
                    f"in {shown(text)} the argument {twice[0]} of {node.func.id} is given twice, "
                    "and only one value can hold: leave one out"
                )
            arguments = {str(k.arg): _literal(k.value, text) for k in node.keywords}
            return leaf(addresses.get(node.func.id, node.func.id), **arguments)
        raise UserError(
            f"{shown(text)} cannot be read at {ast.unparse(node)!r}: methods are joined by * and + "
            f"only; {EXAMPLE}"
        )

    made = value(tree)
    if isinstance(made, (int, float)):
        raise UserError(f"{shown(text)} is a number, not a method: {EXAMPLE}")
    return made


def parse(text: str) -> tuple[ast.expr, dict[str, str]]:
    """The tree of an expression, and the addresses (file.py:function) that stand behind the names
    it puts for them.
    """
    addresses: dict[str, str] = {}

    def hide(found: re.Match[str]) -> str:
        name = f"{HIDDEN}{len(addresses)}"
        addresses[name] = found[0]
        return name

    try:
        return ast.parse(ADDRESS.sub(hide, text).strip(), mode="eval").body, addresses
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(
            f"{shown(text)} is neither the name of a method nor an expression of methods: {EXAMPLE}"
        ) from None


def _literal(node: ast.expr, text: str) -> Any:
    """An argument: a number, a text with or without quotes, true, false, None, or several in
    brackets.
    """
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None}.get(node.id, node.id)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_literal(x, text) for x in node.elts)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"in {shown(text)} the argument {ast.unparse(node)!r} is not a number, a text or a "
            f"list of these: {EXAMPLE}"
        ) from None


def bracketed(name: str, right: bool = False) -> str:
    """The name of a method as a factor: in brackets where it is a sum, and to the right of * where
    it is a product.
    """
    try:
        tree, _ = parse(name)
    except UserError:  # a path with signs in it
        return name
    return (
        f"({name})"
        if isinstance(tree, ast.BinOp) and (right or isinstance(tree.op, ast.Add))
        else name
    )


def base_of(name: str) -> str | None:
    """The method that a product of methods multiplies, as text; None where the name is no such
    product.
    """
    try:
        tree, addresses = parse(name)
    except UserError:  # a path with signs in it
        return None
    base = tree
    while (
        isinstance(base, ast.BinOp)
        and isinstance(base.op, ast.Mult)
        and not isinstance(base.left, ast.Constant)
    ):
        base = base.left
    text = reduce(lambda t, pair: t.replace(*pair), addresses.items(), ast.unparse(base))
    return None if base is tree else text
