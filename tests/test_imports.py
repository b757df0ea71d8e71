"""Who imports whom: rooms downwards only, the loop knows no method, and `import opdkit` stays
light.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import opdkit
import opdkit.objective

ROOT = Path(opdkit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LAYERS = {  # each room and the rooms that it may import, all of them above it here
    "base": "",
    "types": "",
    "objective": "base types",
    "curricula": "base types objective",
    "methods": "base objective curricula",
    "neighbours": "base objective",
    "models": "base types objective",
    "rewards": "base types models",
    "data": "base types models rewards",
    "sampling": "base types objective models",
    "teachers": "base types objective curricula models data",
    "environments": "base types models rewards data sampling",
    "annotators": "base types models rewards data sampling teachers",
    "eval": "base types rewards",
    "report": "base eval",
    "train": "base types objective curricula models rewards teachers environments annotators",
    "run": "base types objective curricula methods models rewards data sampling teachers eval "
    "report train environments annotators",
    "recipes": "base types methods report train run",
    "study": "base methods rewards eval report train run recipes",
    "testing": "base types objective methods",
    "cli": "base types methods neighbours teachers environments report run recipes study testing",
    "__main__": "base cli",
}
MATHEMATICS = ("types", "objective", "curricula", "methods", "testing")
ENGINES = ("teachers", "sampling", "rewards", "curricula", "data", "eval", "report", "train")
HEAVY = (
    "transformers",
    "datasets",
    "peft",
    "bitsandbytes",
    "vllm",
    "ray",
    "triton",
    "matplotlib",
    "gymnasium",
    "stable_baselines3",
    "math_verify",
    "reasoning_gym",
    "pyarrow",
)


def part(module: str) -> str:
    """opdkit.train.loop -> train."""
    return module.split(".")[1]


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Full names of the modules that a file imports, for typing too, and whether it does so when it
    is itself imported.
    """
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(f)
    }
    typing = {
        id(node)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for node in ast.walk(i)
    }
    found = []
    for node in ast.walk(tree):
        at_once = id(node) not in inner | typing
        if isinstance(node, ast.Import):
            found += [(alias.name, at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            whole = node.module == "opdkit"  # from opdkit import recipes
            found += [
                (f"opdkit.{alias.name}" if whole else str(node.module), at_once)
                for alias in node.names
            ]
    return found


def edges() -> set[tuple[str, str]]:
    """(importing part, imported part), the package's own lazy __init__ apart."""
    return {
        (part(".".join(("opdkit", *path.relative_to(ROOT).with_suffix("").parts))), part(name))
        for path in FILES
        if path != ROOT / "__init__.py"
        for name, _ in imports(path)
        if name.startswith("opdkit.")
    }


def rooms() -> set[str]:
    """Folders and files directly in the package."""
    return {
        part(".".join(("opdkit", *p.relative_to(ROOT).with_suffix("").parts))) for p in FILES
    } - {"__init__"}


def test_every_room_has_a_line() -> None:
    assert rooms() == set(LAYERS)


def test_imports_go_down() -> None:
    above: list[str] = []
    for room, below in LAYERS.items():
        assert set(below.split()) <= set(above), room
        above.append(room)
    assert sorted((a, b) for a, b in edges() if a != b and b not in LAYERS[a].split()) == []


def test_readme_names_every_room() -> None:
    """Once each, in the order in which they stand on each other, with the question that the room
    answers.
    """
    text = (
        (ROOT.parent / "README.md")
        .read_text(encoding="utf-8")
        .partition("## Reading the code")[2]
        .partition("\n## ")[0]
    )
    named = re.findall(r"^\| `([\w./]+)` \| \S.* \|$", text, re.M)
    assert [name.removesuffix(".py").removesuffix("/") for name in named] == [
        room for room in LAYERS if room != "__main__"
    ]
    assert all((ROOT / name).exists() for name in named)


def test_few_files_lie_beside_the_rooms() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 6


def test_tests_lie_in_the_rooms_that_they_are_about() -> None:
    folders = {path.parent.name for path in (ROOT.parent / "tests").glob("*/test_*.py")}
    assert folders - {"common", "end_to_end", "hostile", "vllm"} <= rooms()


def test_one_import_line_gives_what_methods_are_made_of() -> None:
    """Every class of the grammar, of signals, losses and facts that has a public name."""
    made = {
        name
        for file in ("grammar", "signals", "losses", "spans", "facts")
        for name, value in vars(import_module(f"opdkit.objective.{file}")).items()
        if isinstance(value, type)
        and value.__module__ == f"opdkit.objective.{file}"
        and not name.startswith("_")
    }
    assert made <= set(opdkit.objective.__all__)
    assert all(getattr(opdkit.objective, name) is not None for name in opdkit.objective.__all__)


def test_engines_and_the_trainer_know_no_method_and_no_run() -> None:
    assert (
        sorted(
            (a, b)
            for a, b in edges()
            if a in ENGINES and b in ("methods", "run", "recipes", "study", "testing")
        )
        == []
    )


def test_methods_are_made_of_the_grammar_and_curricula() -> None:
    assert {b for a, b in edges() if a == "methods"} - {"methods"} <= {
        "base",
        "types",
        "objective",
        "curricula",
    }


def test_nothing_but_the_command_line_stands_on_testing() -> None:
    assert {a for a, b in edges() if b == "testing" and a != "testing"} <= {"cli"}


def test_the_mathematics_needs_torch_alone() -> None:
    """It installs, and its formulas can be checked, where nothing else is; kernels may take a
    faster way where there is one.
    """
    for path in FILES:
        if path.relative_to(ROOT).with_suffix("").parts[0] in MATHEMATICS:
            faster = {"numpy", "triton"} if path.parent.name == "kernels" else set()
            outside = (
                {name.split(".")[0] for name, _ in imports(path)}
                - set(sys.stdlib_module_names)
                - {"opdkit"}
            )
            assert outside <= {"torch"} | faster, path


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    """Inside functions; or in a file that is itself imported so."""
    early = {
        path
        for path in FILES
        for name, at_once in imports(path)
        if at_once and name.split(".")[0] in HEAVY
    }
    modules = {
        ".".join(("opdkit", *path.relative_to(ROOT).with_suffix("").parts)) for path in early
    }
    assert [
        (path.name, name)
        for path in FILES
        for name, at_once in imports(path)
        if at_once and name in modules
    ] == []


def test_import_is_light() -> None:
    code = "import opdkit, sys; print([m for m in ('torch', *sys.argv[1:]) if m in sys.modules])"
    start = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("name", opdkit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(opdkit, name) is not None and name in dir(opdkit)


def test_the_loop_names_no_method() -> None:
    words = set(re.findall(r"\w+", (ROOT / "train" / "loop.py").read_text()))
    assert words & set(opdkit.methods()) == set()
