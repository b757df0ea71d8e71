"""A kind of teacher or of sampler is one file: no other asks which kind it has before it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

import opdkit
from opdkit.sampling.kinds import KINDS as SAMPLERS
from opdkit.teachers.kinds import KINDS as TEACHERS
from opdkit.teachers.routed import RoutedTeacher

ROOT = Path(opdkit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TABLES = {ROOT / "teachers" / "kinds.py", ROOT / "sampling" / "kinds.py"}
CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (*TEACHERS.values(), *SAMPLERS.values(), RoutedTeacher)
}
HOMES = {name: Path(str(sys.modules[cls.__module__].__file__)) for name, cls in CLASSES.items()}
NAMES = {*TEACHERS, *SAMPLERS, RoutedTeacher.kind}


def asks(source: str, known: set[str], table: bool = False) -> list[str]:
    """What a file does with the classes `known` besides importing them and calling them to make
    one; and comparisons of a `.kind` with a kind's name.

    So isinstance, issubclass, `match`, `type(x) is`, dictionaries by class and type unions are
    found alike. A table of kinds may list them too.
    """
    tree = ast.parse(source)
    names = set(known)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname for a in node.names if a.asname and a.name in known}
    allowed = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if table:
        for node in ast.walk(tree):
            if isinstance(node, (ast.DictComp, ast.Dict)):
                allowed |= {id(inner) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        said = getattr(node, "id", None) or getattr(node, "attr", None)
        named = isinstance(node, (ast.Name, ast.Attribute)) and said in names
        if named and id(node) not in allowed:
            found.append(f"{node.lineno}: {said}")
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            by_kind = any(isinstance(s, ast.Attribute) and s.attr == "kind" for s in sides)
            words = {c.value for s in sides for c in ast.walk(s) if isinstance(c, ast.Constant)}
            if by_kind and words & NAMES:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Match) and getattr(node.subject, "attr", "") == "kind":
            found.append(f"{node.lineno}: match on .kind")
    return found


def test_class_names_mean_one_class_each() -> None:
    defined = [
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name in CLASSES
    ]
    assert sorted(defined) == sorted(CLASSES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_asks_which_kind_it_has(path: Path) -> None:
    elsewhere = {name for name, home in HOMES.items() if home != path}
    assert asks(path.read_text(encoding="utf-8"), elsewhere, path in TABLES) == []


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(x, LocalTeacher)",
        "isinstance(x, (int, kinds.LocalTeacher))",
        "issubclass(type(x), LocalTeacher)",
        "type(x) is LocalTeacher",
        "{LocalTeacher: 1}[type(x)]",
        "x: HfSettings | None = None",
        "match x:\n    case LocalTeacher(model=m):\n        pass",
        "from a import LocalTeacher as Mine\nisinstance(x, Mine)",
        "x.kind == 'local'",
        "x.kind in ('vllm', 'server')",
        "match x.kind:\n    case 'hf':\n        pass",
    ],
)
def test_what_counts_as_asking(line: str) -> None:
    assert len(asks(line, set(CLASSES))) == 1


def test_making_one_is_not_asking() -> None:
    source = "from a import LocalTeacher\ny = LocalTeacher('m').held()\nx.kind == 'top_k'"
    assert asks(source, set(CLASSES)) == []


def test_every_kind_is_in_the_file_of_its_settings() -> None:
    """One file a kind, and in it all that the kind says of itself."""
    assert len(set(HOMES.values())) == len(HOMES)
    for cls in TEACHERS.values():
        assert {"open", "held", "identity"} <= set(vars(cls)), cls
    for cls in SAMPLERS.values():
        assert {"open", "room", "pace"} <= set(vars(cls)), cls
