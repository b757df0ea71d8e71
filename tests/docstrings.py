"""Public functions that take or return tensors, and whether they say these tensors' shapes.

    python tests/docstrings.py [ROOM ...]

prints two shares per room, and the functions that do not say them. A function is public where
neither its name nor that of its class begins with an underscore; functions inside functions are
not counted. It is about tensors where an annotation of a parameter or of its result mentions
Tensor. It says a shape where its docstring, or a comment between its name and its first statement,
holds one: "[B, T]", "[N]", "[n, k]", "[2 * V]", "[]", or that something is a scalar. One shape is
enough, so that a share is an upper bound of what a strict reader would find.

The first share counts what stands at the function itself. The second also counts a method without
a docstring of its own where its class says it, or the method that it overrides or that one's class:
"A signal, [B, T]: ..." says it of `value`. The first is asked for.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "opdkit"
# a letter, a word, two of them, a number, sums and products of these
SIZE = r"(?:\w[\w']*(?: [\w']+)?(?: ?[*+/-] ?\w+)*|\.\.\.)"
# not an index, as in row["answer"]; not an interval, as in [0, 1]
SHAPE = re.compile(
    rf"(?<![\w\])])\[(?:(?=[^\]]*(?:[A-Za-z]|\.\.\.)){SIZE}(?:, ?{SIZE})*)?\]|\bscalars?\b"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """A public function that is about tensors."""

    path: Path
    line: int
    name: str  # with its class
    itself: bool  # whether it says a shape
    said: bool  # itself, or through its class or the method that it overrides

    @property
    def room(self) -> str:
        """The folder or file of the package that it lies in."""
        return self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")

    def __str__(self) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{self.line} {self.name}"


Owned = tuple[str, Function]  # a function with the name of its class, "" without


def public(body: list[ast.stmt], owner: str = "") -> Iterator[Owned]:
    """Public functions of a module, and public methods of its public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, node.name)
        elif isinstance(node, Function) and not node.name.startswith("_"):
            yield owner, node


def of_tensors(function: Function) -> bool:
    """Whether it takes or returns tensors."""
    a = function.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    annotations = [arg.annotation for arg in given if arg is not None] + [function.returns]
    return any("Tensor" in ast.unparse(note) for note in annotations if note is not None)


def comments(source: str) -> dict[int, str]:
    """Comments by line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}


class Sources:
    """Modules, read, with the classes that their classes are made from."""

    def __init__(self, sources: dict[Path, str]):
        self.trees = {path: ast.parse(source) for path, source in sources.items()}
        self.notes = {path: comments(source) for path, source in sources.items()}
        self.classes = {  # by name: no two are called the same
            node.name: (path, node)
            for path, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }

    def found(self) -> list[Found]:
        """Every public function that is about tensors."""
        return [
            Found(
                path,
                f.lineno,
                f"{owner}.{f.name}" if owner else f.name,
                self.says_shape(path, f),
                self.says_shape(path, f) or self.class_says_shape(owner, f),
            )
            for path, tree in self.trees.items()
            for owner, f in public(tree.body)
            if of_tensors(f)
        ]

    def says_shape(self, path: Path, function: Function) -> bool:
        """Whether docstring or comments of the signature hold a shape."""
        lines = range(function.lineno, function.body[0].lineno)
        said = [self.notes[path].get(line, "") for line in lines]
        said.append(ast.get_docstring(function) or "")
        return SHAPE.search(" ".join(said)) is not None

    def class_says_shape(self, owner: str, function: Function) -> bool:
        """Whether a method says nothing itself, and its class does, or the nearest method that it
        overrides, or that one's class.
        """
        if owner not in self.classes or ast.get_docstring(function) is not None:
            return False
        _, node = self.classes[owner]
        if SHAPE.search(ast.get_docstring(node) or ""):
            return True
        for base in node.bases:
            name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
            if name not in self.classes:
                continue
            path, parent = self.classes[name]
            for method in parent.body:
                if isinstance(method, Function) and method.name == function.name:
                    return self.says_shape(path, method) or self.class_says_shape(name, method)
            if self.class_says_shape(name, function):
                return True
        return False


def found() -> list[Found]:
    """Every public function of the package that is about tensors."""
    return Sources(
        {p: p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py"))}
    ).found()


def share(said: Sequence[bool]) -> float:
    """Of functions, those that say a shape; all of none."""
    return sum(said) / len(said) if said else 1.0


def table(functions: list[Found]) -> str:
    """The shares per room, then the offenders."""
    lines = ["room         functions  itself  or its class"]
    for room in [*dict.fromkeys(f.room for f in functions), "all"]:
        those = [f for f in functions if room in (f.room, "all")]
        both = share([f.itself for f in those]), share([f.said for f in those])
        lines.append(f"{room:<12} {len(those):9}  {both[0]:6.0%}  {both[1]:12.0%}")
    return "\n".join([*lines, *(str(f) for f in functions if not f.said)])


if __name__ == "__main__":
    print(table([f for f in found() if not sys.argv[1:] or f.room in sys.argv[1:]]))
