"""Programs that a model wrote, run where they can do no harm: see docs/rewards.md for what holds,
and against what.

Each program runs in a process of its own that has given up the network, other processes, and all
files but Python's own to read and an empty folder to write; its tests run in another process and
only exchange plain data with it. `jail/` holds those processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field

from opdkit.base.errors import UserError
from opdkit.rewards.workers import ConfinedWork, cores, unprotected

# runs `_code`, and shows the value of a last line that is an expression, as a console does
_SHOWN = """
import ast as _a
try:
    _tree = _a.parse(_code, "<code>")
    _last = _tree.body.pop() if _tree.body and isinstance(_tree.body[-1], _a.Expr) else None
    _names = {"__name__": "__main__"}
    exec(compile(_tree, "<code>", "exec"), _names)
    if _last is not None:
        _value = eval(compile(_a.Expression(_last.value), "<code>", "eval"), _names)
        if _value is not None:
            print(_value)
except BaseException as _error:
    print("".join(_t.format_exception_only(type(_error), _error)).strip())
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use. It is killed where it takes more, and fails its case."""

    seconds: int = 5  # of CPU, for the program and for its tests each; three times as many may pass
    memory: int = 1024  # MiB of address space, for each

    def __post_init__(self) -> None:
        for name, value, least in (("seconds", self.seconds, 1), ("memory", self.memory, 64)):
            if not isinstance(value, int) or value < least:
                raise UserError(
                    f"Limits({name}={value!r}) must be a whole number from {least} on: less lets "
                    "no program start"
                )


@dataclass(frozen=True)
class Calls:
    """A program, and tests that call its functions.

    sources: the program; the first of these that is Python. wanted: the program's names that tests
    see. before: code that tests begin with, overridden by those names; setup: code after them.
    tests: each passes where it raises nothing.
    """

    sources: tuple[str, ...]
    tests: tuple[str, ...]
    wanted: tuple[str, ...]
    before: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prints:
    """A program that reads its standard input, and what it must print for each."""

    sources: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """How many tests passed, of how many, and what was wrong with the first that did not."""

    passed: int
    total: int
    why: str = ""

    @property
    def right(self) -> bool:
        return self.passed == self.total


@dataclass(frozen=True)
class Sandbox:
    """Runs cases. workers: programs at once; 0: one per core. partial: go on after the first test
    that fails.

    unprotected: run programs also where they cannot be kept from writing files, the network and
    other processes. without: layers to leave out, for tests of the others.
    """

    limits: Limits = field(default_factory=Limits)
    workers: int = 0
    partial: bool = False
    unprotected: bool = False
    without: tuple[str, ...] = ()

    @property
    def programs(self) -> ConfinedWork:
        return ConfinedWork(
            "programs",
            "code",
            unprotected("Code"),
            without=self.without,
            unprotected=self.unprotected,
        )

    def check(self) -> None:
        """Refuse a machine on which programs cannot be confined."""
        self.programs.check()

    def run(
        self, cases: Sequence[Calls | Prints], tick: Callable[[int], object] = lambda done: None
    ) -> list[Verdict]:
        """A verdict per case, in order. tick: called with the number of cases done."""
        self.check()
        done: dict[Calls | Prints, Verdict] = {}
        with ThreadPoolExecutor(min(self.workers or cores(), max(len(cases), 1))) as pool:
            # equal ones once
            futures = {pool.submit(self._judge, case): case for case in dict.fromkeys(cases)}
            try:
                for future in as_completed(futures):
                    done[futures[future]] = future.result()
                    tick(len(cases) * len(done) // len(futures))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [done[case] for case in cases]

    def output(self, code: str) -> str:
        """What a program prints, and after it what went wrong; errors as Python shows them."""
        # the program itself runs it, so that it is parsed there and not here
        source = f"import traceback as _t\n_code = {code!r}\n{_SHOWN}"
        case = {"sources": [source], "shows": True, **asdict(self.limits)}
        told = self.programs.ask(json.dumps(case))
        said = str(told["said"])
        return f"{said}\n{told['why']}".strip() if told["why"] else said

    def _judge(self, case: Calls | Prints) -> Verdict:
        told = self.programs.ask(
            json.dumps({**asdict(case), **asdict(self.limits), "partial": self.partial})
        )
        return Verdict(
            told["passed"], len(case.tests if isinstance(case, Calls) else case.inputs), told["why"]
        )
