"""Tests that tell what came where another value was expected."""

from __future__ import annotations

import ast
from types import CodeType
from typing import Any

LARGEST = 20_000  # characters: a tree of Python objects takes much memory
CODE, VALUE = 100, 80  # characters of an expression and of a value that are told
LEFT, RIGHT, TELL = "_opdkit_left", "_opdkit_right", "_opdkit_tell"


def compiled(source: str, file: str) -> CodeType:
    """A test as code: each `assert a == b` without a message gets one, made by the function `TELL`
    of the test's names. What is evaluated, and in which order, stays.
    """
    if len(source) > LARGEST:
        return compile(source, file, "exec", dont_inherit=True)
    tree = _Telling().visit(ast.parse(source, file))
    return compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True)


class _Telling(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        test = node.test
        if node.msg is not None:
            return node
        if isinstance(test, ast.Compare) and [type(op) for op in test.ops] == [ast.Eq]:
            code, left, right = ast.unparse(test.left), test.left, test.comparators[0]
            test.left, test.comparators = _kept(LEFT, left), [_kept(RIGHT, right)]
        # of APPS, whose tests are made here
        elif isinstance(test, ast.Call) and ast.unparse(test.func) == "_equal":
            code, (left, right) = ast.unparse(test.args[0]), test.args
            test.args = [_kept(LEFT, left), _kept(RIGHT, right)]
        else:
            return node
        values = [ast.Name(name, ast.Load()) for name in (LEFT, RIGHT)]
        node.msg = ast.Call(ast.Name(TELL, ast.Load()), [ast.Constant(code[:CODE]), *values], [])
        return node


def _kept(name: str, value: ast.expr) -> ast.NamedExpr:
    return ast.NamedExpr(ast.Name(name, ast.Store()), value)


def tell(code: str, left: Any, right: Any) -> str:
    """f(2) gives 5 and not 4."""
    return f"{code} gives {_shown(left)} and not {_shown(right)}"


def _shown(value: Any) -> str:
    try:
        return repr(value)[:VALUE]
    except BaseException:  # a value of the program's, which shows itself
        return f"an object of {type(value).__name__}"
