"""How the package reads: short functions, short files, and tensors whose shapes are said."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.docstrings import PACKAGE, Function, Sources, found, share, table

FILES = sorted(PACKAGE.rglob("*.py"))
LINES_OF_A_FUNCTION, LINES_OF_A_FILE = 60, 450
SHARE = 0.95  # of the public functions about tensors say a shape


def test_no_function_is_long() -> None:
    """From the line of its name to its last, docstring included."""
    long = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}: {lines} lines"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, Function)
        and node.end_lineno is not None
        and (lines := node.end_lineno - node.lineno + 1) > LINES_OF_A_FUNCTION
    ]
    assert not long, "\n".join(["", *long])


def test_no_file_is_long() -> None:
    long = [
        f"{path.relative_to(PACKAGE.parent)}: {lines} lines"
        for path in FILES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES_OF_A_FILE
    ]
    assert not long, "\n".join(["", *long])


def test_public_functions_about_tensors_say_shapes() -> None:
    functions = found()
    assert len(functions) > 100  # they are found at all
    assert share([f.itself for f in functions]) >= SHARE, "\n" + table(functions)


# ------------------------------------------------------------------------ what counts as saying one


@pytest.mark.parametrize(
    "said",
    ["[B, T] nats", "the mean, []", "[T * k]", "[B, key heads, C]", "[N, ...]", "a scalar", "[2V]"],
)
def test_a_shape_is_seen_in_docstrings_and_in_comments_of_the_signature(said: str) -> None:
    for source in (
        f"def f(x: Tensor) -> float:\n    'Of {said}.'",
        f"def f(x: Tensor) -> float:  # {said}\n    return 0.0",
        f"def f(\n    x: Tensor,  # {said}\n) -> float:\n    return 0.0",
    ):
        assert [f.itself for f in Sources({Path("a.py"): source}).found()] == [True], source


@pytest.mark.parametrize("said", ['row["answer"]', "in [0, 1]", "opdkit[data]", "x[i]", ""])
def test_indices_and_intervals_are_no_shapes(said: str) -> None:
    source = f"def f(x: Tensor) -> float:\n    'Of {said}.'"
    assert [f.said for f in Sources({Path("a.py"): source}).found()] == [False]


def test_who_is_counted_and_what_a_base_class_says() -> None:
    """Public functions whose signature mentions Tensor; a method without a docstring says what its
    class says, or the nearest method that it overrides; one with a docstring only what stands
    there.
    """
    source = """
def no_tensor(x: int) -> int: ...
def _private(x: Tensor) -> int: ...
def many(*x: Tensor | None) -> int: ...
class Base:
    def value(self, x: Tensor) -> Tensor:
        "[B, T]"
    def other(self, x: Tensor) -> Tensor: ...
class Middle(Base): ...
class Low(Middle):
    def value(self, x: Tensor) -> Tensor: ...
    def other(self, x: Tensor) -> Tensor: ...
class Own(Base):
    def value(self, x: Tensor) -> Tensor:
        "Something else."
class Told:
    "A table [B, T]."
    def value(self, x: Tensor) -> Tensor: ...
    def other(self, x: Tensor) -> Tensor:
        "Something else."
class _Hidden:
    def value(self, x: Tensor) -> Tensor: ...
"""
    functions = Sources({Path("a.py"): source}).found()
    assert {f.name: (f.itself, f.said) for f in functions} == {
        "many": (False, False),
        "Base.value": (True, True),
        "Base.other": (False, False),
        "Low.value": (False, True),
        "Low.other": (False, False),
        "Own.value": (False, False),
        "Told.value": (False, True),
        "Told.other": (False, False),
    }
    assert share([f.said for f in functions]) == pytest.approx(3 / 8)
