"""The reward `code`: the program in a response passes its row's tests, in a sandbox."""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from opdkit.base.errors import UserError
from opdkit.base.progress import progress
from opdkit.rewards.program import answer, continued, defines, programs
from opdkit.rewards.sandbox import Calls, Limits, Prints, Sandbox, Verdict
from opdkit.types import DataRow, Rollout

MANY = 200  # programs whose running takes long enough to show progress
COLUMNS = (
    "test and entry_point (HumanEval), test_list (MBPP), input_output (APPS) or tests (lines with "
    "assert)"
)

# What a function returned equals what APPS wants of it, which writes tuples as lists and wraps
# single results.
EQUAL = """
def _equal(said, wanted):
    said = list(said) if isinstance(said, tuple) else said
    return said == wanted or (isinstance(wanted, list) and len(wanted) == 1 and said == wanted[0])
"""


@dataclass(frozen=True)
class Code:
    """1.0 where the response's program passes all tests of its row, else 0.0; partial: the share of
    tests that pass.

    The program is the last fenced block that defines what the tests call, else the last block, else
    the whole response. A row has HumanEval's, MBPP's or APPS's columns, or `tests`: see
    docs/rewards.md, also for what the sandbox holds against. limits: of each program. workers:
    programs at once; 0: one per core. challenge: MBPP's challenge_test_list too.
    """

    confined = False  # only the programs are

    limits: Limits = field(default_factory=Limits)
    workers: int = 0
    partial: bool = False
    challenge: bool = False
    unprotected: bool = False  # run programs also on a machine that cannot confine them
    correct_from: float = 1.0

    @property
    def sandbox(self) -> Sandbox:
        return Sandbox(self.limits, self.workers, self.partial, self.unprotected)

    def check(self) -> None:
        """Refuse a machine on which programs cannot be confined, before a run begins."""
        self.sandbox.check()

    def check_row(self, row: DataRow) -> None:
        """Refuse a row without tests that can be read."""
        _case(row, "", self.challenge)

    def __call__(self, rollout: Rollout) -> float:
        return self.score_many([rollout])[0]

    def score_many(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [value for value, _ in self.told_many(rollouts)]

    def told_many(self, rollouts: Sequence[Rollout]) -> list[tuple[float, str]]:
        """Rewards, and of each response that is not right what was wrong with the first test that
        it fails.
        """
        return [
            (v.passed / v.total if self.partial else float(v.right), "" if v.right else v.why)
            for v in self.verdicts(rollouts)
        ]

    def verdicts(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """What `score_many` is taken from: tests passed, and what was wrong with the first that was
        not.
        """
        cases = [case(r, challenge=self.challenge) for r in rollouts]
        shown = (
            progress("Running programs", total=len(cases), unit="programs")
            if len(cases) >= MANY
            else nullcontext(_quiet)
        )
        with shown as tick:
            return self.sandbox.run(cases, tick)


def _quiet(done: int) -> None:
    pass


# ------------------------------------------------------------------------------------------- a case


def case(rollout: Rollout, *, challenge: bool = False) -> Calls | Prints:
    """The response's program, and the row's tests of it."""
    try:
        return _case(rollout.row, answer(rollout.text), challenge)
    except UserError as error:
        raise UserError(f"rollout {rollout.id!r}: {error}") from error


def _case(row: DataRow, text: str, challenge: bool) -> Calls | Prints:
    if row.get("input_output") not in (None, "", {}):
        return _input_output(row, text)
    if row.get("test") and row.get("entry_point"):
        return _human_eval(row, text)
    if row.get("test_list"):
        setup = [*_lines(row.get("test_imports")), *_lines(row.get("test_setup_code"))]
        tests = [
            *_lines(row["test_list"]),
            *_lines(row.get("challenge_test_list") if challenge else None),
        ]
        return _asserts(row, text, tuple(tests), tuple(setup))
    if row.get("tests"):
        return _asserts(
            row, text, tuple(_lines(row["tests"])), tuple(_lines(row.get("test_setup_code")))
        )
    raise UserError(
        f"the reward 'code' reads tests from the row's columns {COLUMNS}, and the row has only "
        f"{', '.join(row)}: use data with tests, or another reward"
    )


def _lines(value: Any) -> list[str]:
    """A text, or several."""
    texts = [value] if isinstance(value, str) else value or []
    return [str(text) for text in texts if str(text).strip()]


def _human_eval(row: DataRow, text: str) -> Calls:
    """check(candidate) of the row's `test`.

    A response that does not define the entry point continues the prompt.
    """
    entry, prompt = str(row["entry_point"]), row["prompt"] if _is_code(row.get("prompt")) else ""
    wanted = _loads(_parsed(entry))  # of Solution().solve, Solution
    codes = programs(text, wanted)
    if any(defines(code, wanted) for code in codes):
        sources = [source for c in codes for source in (f"{_before(prompt, wanted)}\n{c}", c)]
    else:
        # it goes on in the function's body
        code = text if re.match(r"\s*^[ \t]", text, flags=re.MULTILINE) else codes[0]
        sources = [prompt + way for way in continued(code)]
    return Calls(
        tuple(dict.fromkeys(sources)),
        (f"check({entry})",),
        wanted,
        before=(prompt,),
        setup=(str(row["test"]),),
    )


def _asserts(row: DataRow, text: str, tests: tuple[str, ...], setup: tuple[str, ...]) -> Calls:
    plan = _plan(tests, setup, str(row.get("code") or ""))
    return Calls((*programs(text, plan.wanted),), plan.tests, plan.wanted, setup=plan.setup)


def _input_output(row: DataRow, text: str) -> Calls | Prints:
    """APPS: pairs of standard input and output, or of arguments and result of the function
    `fn_name`.
    """
    given = row["input_output"]
    try:
        given = json.loads(given) if isinstance(given, str) else given
        inputs, outputs, name = list(given["inputs"]), list(given["outputs"]), given.get("fn_name")
    except (ValueError, TypeError, KeyError, AttributeError):
        inputs, outputs, name = [], [], None
    if not inputs or len(inputs) != len(outputs):
        raise UserError(
            f'input_output must be {{"inputs": [...], "outputs": [...]}}, as many of each, not '
            f"{str(given)[:100]!r}"
        )
    if name is None:
        return Prints((*programs(text, ()),), tuple(map(_text, inputs)), tuple(map(_text, outputs)))
    find = (
        f"try:\n    _function = Solution().{name}\nexcept (NameError, AttributeError):\n"
        f"    _function = {name}\n"
    )
    pairs = [
        _from_json(i, o) if isinstance(i, str) else (i, o)
        for i, o in zip(inputs, outputs, strict=True)
    ]
    tests = tuple(
        f"assert _equal(_function(*{list(arguments)!r}), {result!r})" for arguments, result in pairs
    )
    wanted = (name, "Solution")
    return Calls((*programs(text, wanted),), tests, wanted, setup=(EQUAL, find))


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _from_json(given: str, wanted: Any) -> tuple[list[Any], Any]:
    """LiveCodeBench writes arguments as JSON, one per line, and the result as JSON."""
    try:
        return [json.loads(line) for line in given.splitlines() if line.strip()], json.loads(wanted)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"input_output holds text that is not JSON ({error}): {given[:100]!r}, "
            f"{str(wanted)[:100]!r}"
        ) from error


def _before(prompt: str, names: Sequence[str]) -> str:
    """What stands in a prompt before the function to be written: imports, and functions to use."""
    found = [
        re.search(
            rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b", prompt, flags=re.MULTILINE
        )
        for name in names
    ]
    return prompt[: min((match.start() for match in found if match), default=len(prompt))]


# ---------------------------------------------------------------------------------------- the tests


@dataclass(frozen=True)
class PreparedTests:
    """Tests one by one, what prepares them, and the names that the program must bring."""

    tests: tuple[str, ...]
    setup: tuple[str, ...]
    wanted: tuple[str, ...]


@lru_cache(maxsize=4096)
def _plan(tests: tuple[str, ...], setup: tuple[str, ...], reference: str) -> PreparedTests:
    """reference: a right program, where the row has one; it tells which names are the program's
    even where Python has them too.
    """
    before, body = ([s for text in texts for s in _parsed(text).body] for texts in (setup, tests))
    units, last, calls = [], [], []
    defined = {s.name for s in body if isinstance(s, ast.FunctionDef)}
    for statement in body:
        last.append(statement)
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test"):
            calls.append(_parsed(f"{statement.name}()").body[0])
        elif _is_test(statement, defined):
            units.append(last)
            last = []
    for call in calls:
        units.append([*last, call])
        last = []
    if not units:
        raise UserError(
            "the row's tests assert nothing, so any program would pass them: "
            f"{' '.join(tests)[:100]!r}"
        )
    wanted, modules = _names([*before, *body], reference)
    if not wanted:
        raise UserError(
            "the row's tests call nothing of the program's, so any would pass them: "
            f"{' '.join(tests)[:100]!r}"
        )
    written = tuple("\n".join(map(ast.unparse, unit)) for unit in units)
    return PreparedTests(written, (*(f"import {name}" for name in modules), *setup), wanted)


def _is_test(statement: ast.stmt, defined: set[str]) -> bool:
    """It asserts something, or calls a function of the tests, such as check(f)."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    called = (
        statement.value.func
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        else None
    )
    asserts = any(isinstance(node, ast.Assert) for node in ast.walk(statement))
    return asserts or (isinstance(called, ast.Name) and called.id in defined)


def _names(body: list[ast.stmt], reference: str) -> tuple[tuple[str, ...], list[str]]:
    """The names that tests take from the program, and the modules of Python's that they use without
    importing them.

    A name of Python's, such as `set`, is not taken: with a set of its own, a program could make all
    comparisons come out equal.
    """
    tree = ast.Module(body, [])
    loaded = _loads(tree)
    own = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    own |= {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    own |= {
        (a.asname or a.name).split(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, ast.Import | ast.ImportFrom)
        for a in n.names
    }
    own |= {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name
    }
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    free = [name for name in loaded if name not in own]
    modules = [name for name in free if name in sys.stdlib_module_names and name not in called]
    wanted = [
        n
        for n in free
        if n not in modules and (not hasattr(builtins, n) or defines(reference, [n]))
    ]
    # MBPP has functions to write that are named `sum` and `round`, and tests that call nothing
    # else.
    return tuple(wanted or [name for name in free if name in called]), modules


def _loads(tree: ast.AST) -> tuple[str, ...]:
    """The names that code reads, in the order of their first use."""
    names = (
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    )
    return tuple(dict.fromkeys(names))


def _parsed(test: str) -> ast.Module:
    try:
        return ast.parse(test)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"the row's tests are not Python ({error}): {test[:100]!r}") from error


def _is_code(prompt: Any) -> bool:
    """Whether a prompt is the beginning of a program, not a question in words."""
    if not isinstance(prompt, str):
        return False
    try:
        body = ast.parse(prompt).body
    except (SyntaxError, ValueError):
        return False
    kinds = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return any(isinstance(statement, kinds) for statement in body)
