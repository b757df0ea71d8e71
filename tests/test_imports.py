"""Who imports whom: downwards only, the loop knows no method, and `import opdkit` stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

import opdkit

ROOT = Path(opdkit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LAYERS = (  # a part imports itself and parts of layers above its own line here; nothing from its own layer or below
    ("errors", "progress", "interrupt"),
    ("maths", "address", "config", "track", "identity", "quantize", "endpoint"),
    ("kernels",),
    ("types",),
    ("objective",),
    ("signals", "head", "diagnostics"),
    ("align",),
    ("losses", "facts", "curricula", "rewards", "diagnostics"),
    ("models", "data", "eval"),
    ("forward", "sampling", "compose"),
    ("teachers", "method", "report"),  # method: method.py and methods/
    ("train", "testing"),
    ("run",),
    ("engines", "show", "explain"),
    ("build", "pages"),
    ("plan",),
    ("launch", "commands", "doctor", "offline"),
    ("recipes",),
    ("compare",),
    ("cli",),
    ("__main__",),
)
MATHEMATICS = (
    "types",
    "maths",
    "objective",
    "signals",
    "align",
    "losses",
    "head",
    "facts",
    "compose",
    "method",
    "curricula",
    "testing",
)
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
    "math_verify",
    "reasoning_gym",
    "pyarrow",
)


def part(module: str) -> str:
    """opdkit.methods.opd -> method; opdkit.train.loop -> train."""
    return module.split(".")[1].replace("methods", "method")


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Full names of the modules that a file imports, for typing too, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text())
    inner = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in ast.walk(f)}
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
            whole = node.module == "opdkit"  # from opdkit import maths
            found += [(f"opdkit.{alias.name}" if whole else str(node.module), at_once) for alias in node.names]
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


def test_every_part_has_a_layer() -> None:
    parts = {part(".".join(("opdkit", *p.relative_to(ROOT).with_suffix("").parts))) for p in FILES} - {"__init__"}
    assert parts == {name for layer in LAYERS for name in layer}


def test_imports_go_down() -> None:
    depth = {name: n for n, layer in enumerate(LAYERS) for name in layer}
    assert sorted((a, b) for a, b in edges() if a != b and depth[a] <= depth[b]) == []


def test_engines_and_the_trainer_know_no_method_and_no_run() -> None:
    assert sorted((a, b) for a, b in edges() if a in ENGINES and b in ("method", "run", "recipes", "testing")) == []


def test_methods_are_made_of_the_grammar_and_curricula() -> None:
    below = {"errors", "address", "types", "maths", "objective", "signals", "align", "losses", "head", "facts"}
    below |= {"curricula", "compose"}
    assert {b for a, b in edges() if a == "method"} - {"method"} <= below


def test_nothing_but_the_command_line_stands_on_testing() -> None:
    assert {a for a, b in edges() if b == "testing" and a != "testing"} <= {"cli"}


def test_the_mathematics_needs_torch_alone() -> None:
    """It installs, and its formulas can be checked, where nothing else is."""
    for path in FILES:
        if (path.parent == ROOT and path.stem in MATHEMATICS) or path.parent.name in ("methods", "curricula"):
            outside = {name.split(".")[0] for name, _ in imports(path)} - set(sys.stdlib_module_names) - {"opdkit"}
            assert outside <= {"torch"}, path


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    """Inside functions; or in a file that is itself imported so."""
    early = {path for path in FILES for name, at_once in imports(path) if at_once and name.split(".")[0] in HEAVY}
    modules = {".".join(("opdkit", *path.relative_to(ROOT).with_suffix("").parts)) for path in early}
    assert [(path.name, name) for path in FILES for name, at_once in imports(path) if at_once and name in modules] == []


def test_import_is_light() -> None:
    code = "import opdkit, sys; print([m for m in ('torch', *sys.argv[1:]) if m in sys.modules])"
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("name", opdkit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(opdkit, name) is not None and name in dir(opdkit)


def test_no_file_is_long() -> None:
    assert [(path.name, n) for path in FILES if (n := len(path.read_text().splitlines())) > 500] == []


def test_the_loop_names_no_method() -> None:
    words = set(re.findall(r"\w+", (ROOT / "train" / "loop.py").read_text()))
    assert words & set(opdkit.methods()) == set()
