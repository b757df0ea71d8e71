"""The door of a person's own code: methods, rewards, recipes; and expressions of methods."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.conftest import Ground
from tests.hostile.judge import EITHER, REFUSED, WORKS, Attack

pytestmark = pytest.mark.hostile

EXPRESSIONS = {
    "an argument twice": "tropd(k=2, k=3)",
    "an argument of no name": "tropd(2)",
    "an argument of a text": "tropd(k='many')",
    "a list as an argument": "tropd(k=[1])",
    "a formula as an argument": "tropd(k=10**9)",
    "a call as an argument": "tropd(k=open('x'))",
    "k of 0": "tropd(k=0)",
    "k of -1": "tropd(k=-1)",
    "k of half": "tropd(k=0.5)",
    "no number": "gkd(beta=nan)",
    "beta of 2": "gkd(beta=2)",
    "a method of a method": "opd(opd())",
    "nothing": "",
    "blanks": "   ",
    "a sign": "*",
    "an open bracket": "opd(",
    "open brackets, 200": "opd" + "(" * 200,
    "brackets, 5,000": "(" * 5000 + "opd" + ")" * 5000,
    "times nothing": "opd *",
    "times 0": "0 * opd",
    "times infinity": "1e400 * opd",
    "times -1": "-1 * opd",
    "plus a number": "opd + 1",
    "only a number": "3",
    "Python": "__import__('os').system('touch x')",
    "an attribute": "opd.objective",
    "an index": "opd[0]",
    "a lambda": "(lambda: opd)()",
    "a file that is not there": "none.py:mine",
    "a name that is near": "tropdd",
    "a NUL": "op\0d",
    "a smile": "\U0001f600",
    "a method 3,000 times": " * ".join(["opd"] * 3000),
}
HEAD = "from opdkit.objective import *\nimport sys\n"
# bodies of `def mine():`, or whole files where they begin at the left
METHODS: dict[str, tuple[str, str]] = {
    "raises": ("    raise RuntimeError('no')", REFUSED),
    "raises what cannot be printed": (
        "    class Bad(Exception):\n        __str__ = None\n    raise Bad()",
        REFUSED,
    ),
    "raises BaseException": ("    raise BaseException('no')", REFUSED),
    "raises GeneratorExit": ("    raise GeneratorExit", REFUSED),
    "raises MemoryError": ("    raise MemoryError", REFUSED),
    "recurses": ("    return mine()", REFUSED),
    "calls sys.exit(0)": ("    sys.exit(0)", REFUSED),
    "calls sys.exit()": ("    sys.exit()", REFUSED),
    "calls sys.exit of a text": ("    sys.exit('bye')", REFUSED),
    "returns None": ("    return None", REFUSED),
    "returns a dict": ("    return {'loss': 1}", REFUSED),
    "returns a generator": ("    yield Objective()", REFUSED),
    "returns a number": ("    return 10**5000", REFUSED),
    "returns itself": ("    return mine", REFUSED),
    "returns a class": ("    return Objective", REFUSED),
    "returns what cannot be printed": (
        "    class Bad:\n        def __repr__(self): raise ValueError\n    return Bad()",
        REFUSED,
    ),
    "returns an empty objective": ("    return Objective()", REFUSED),
    "is asynchronous": ("async def mine():\n    return 1", REFUSED),
    "is a class": ("class mine:\n    pass", REFUSED),
    "is a number": ("mine = 3", REFUSED),
    "is not there": ("other = 3", REFUSED),
    "is no Python": ("def mine(:", REFUSED),
    "is indented": ("  def mine(): pass", REFUSED),
    "is not UTF-8": ("# coding: utf-8\nx = '\udcff'", REFUSED),
    "has a NUL": ("mine = '\0'", REFUSED),
    "is empty": ("", REFUSED),
    "leaves while it is read": ("sys.exit(0)", REFUSED),
    "raises while it is read": ("raise KeyError('x')", REFUSED),
    "imports what is not there": ("import nothing_of_that_name", REFUSED),
    "needs an argument": ("def mine(x):\n    return None", REFUSED),
    "has a signal that raises": (
        "class S(Signal):\n    def value(self, batch): raise RuntimeError('no')\n"
        "def mine(): return Objective(PolicyGradient(S()))",
        REFUSED,
    ),
    "has a signal that leaves": (
        "class S(Signal):\n    def value(self, batch): sys.exit(0)\n"
        "def mine(): return Objective(PolicyGradient(S()))",
        REFUSED,
    ),
    "has a signal of a wrong shape": (
        "import torch\nclass S(Signal):\n    def value(self, batch): return torch.ones(7)\n"
        "def mine(): return Objective(PolicyGradient(S()))",
        REFUSED,
    ),
    "has a signal that is None": (
        "class S(Signal):\n    def value(self, batch): return None\n"
        "def mine(): return Objective(PolicyGradient(S()))",
        REFUSED,
    ),
    "has a signal that is no number": (
        "import torch\nclass S(Signal):\n    def value(self, batch): "
        "return torch.full(batch.shape, torch.nan)\n"
        "def mine(): return Objective(PolicyGradient(S()))",
        REFUSED,
    ),
    "is right": (
        "def mine(): return Objective(PolicyGradient(LogRatio('teacher', 'student')))",
        WORKS,
    ),
}
# what `def mine(rollout):` does
REWARDS: dict[str, tuple[str, str]] = {
    "raises": ("    raise RuntimeError('no')", REFUSED),
    "raises BaseException": ("    raise BaseException('no')", REFUSED),
    "calls sys.exit(0)": ("    sys.exit(0)", REFUSED),
    "returns None": ("    return None", REFUSED),
    "returns a text": ("    return '1.0'", REFUSED),
    "returns a dict": ("    return {'reward': 1}", REFUSED),
    "returns a list": ("    return [1.0]", REFUSED),
    "returns a generator": ("    yield 1.0", REFUSED),
    "returns NaN": ("    return float('nan')", REFUSED),
    "returns infinity": ("    return float('inf')", REFUSED),
    "returns 10**400": ("    return 10**400", REFUSED),
    "returns 10**5000": ("    return 10**5000", REFUSED),
    "returns a complex number": ("    return 1j", REFUSED),
    "returns a tensor of two": ("    import torch\n    return torch.ones(2)", REFUSED),
    "returns what cannot be printed": (
        "    class Bad:\n        def __repr__(self): raise ValueError\n    return Bad()",
        REFUSED,
    ),
    "recurses": ("    return mine(rollout)", REFUSED),
    "takes two": ("def mine(a, b):\n    return 1.0", REFUSED),
    "takes none": ("def mine():\n    return 1.0", REFUSED),
    "is asynchronous": ("async def mine(rollout):\n    return 1.0", REFUSED),
    "is a number": ("mine = 3", REFUSED),
    "is a class": ("class mine:\n    pass", REFUSED),
    "changes the rollout": ("    rollout.row.clear()\n    return 1.0", EITHER),
    "is right": ("    return float(len(rollout.text))", WORKS),
}
RECIPES: dict[str, tuple[str, str]] = {
    "raises": ("    raise RuntimeError('no')", REFUSED),
    "calls sys.exit(0)": ("    sys.exit(0)", REFUSED),
    "returns None": ("    return None", REFUSED),
    "returns a list": ("    return [1]", REFUSED),
    "returns a generator": ("    yield 1", REFUSED),
    "returns a number for a key": ("    return {1: 2}", REFUSED),
    "returns too little": ("    return {'steps': 3}", REFUSED),
    "returns itself in itself": ("    x = {}\n    x['method'] = x\n    return x", REFUSED),
    "is a number": ("mine = 3", REFUSED),
}


def test_expressions(ground: Ground, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for what, expression in EXPRESSIONS.items():
            yield ground.train(f"method: {what}", method=expression)
        for command in ("explain", "check"):
            for what in ("an argument twice", "nothing", "a name that is near", "Python"):
                yield Attack(f"{command}: {what}", (command, EXPRESSIONS[what]))

    judged("code: expressions of methods", attacks())


def test_methods(ground: Ground, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for number, (what, (body, end)) in enumerate(METHODS.items()):
            address = _file(ground, f"methods/m{number}.py", body, "def mine():")
            yield ground.train(f"a method that {what}", end=end, method=address)
            if number % 6 == 0:
                yield Attack(f"explain a method that {what}", ("explain", address), end)

    judged("code: own methods", attacks())


def test_rewards(ground: Ground, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for number, (what, (body, end)) in enumerate(REWARDS.items()):
            address = _file(ground, f"rewards/r{number}.py", body, "def mine(rollout):")
            yield ground.train(f"a reward that {what}", f"reward={address}", end=end)

    judged("code: own rewards", attacks())


def test_recipes(ground: Ground, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for number, (what, (body, end)) in enumerate(RECIPES.items()):
            address = _file(ground, f"recipes/r{number}.py", body, "def mine():")
            yield Attack(
                f"a recipe that {what}", ("train", "--recipe", address, "output={out}"), end
            )

    judged("code: own recipes", attacks())


def test_what_hangs(ground: Ground, judged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code without end is stopped; the limits are shorter here."""
    from opdkit.methods import method

    monkeypatch.setattr(method, "CALL_SECONDS", 1.0)

    def attacks() -> Iterator[Attack]:
        for number, body in enumerate(
            (
                "    while True: pass",
                "    import time\n    time.sleep(3600)",
                "    while True:\n        try: sum(range(100))\n        except Exception: pass",
            )
        ):
            address = _file(ground, f"hang/m{number}.py", body, "def mine():")
            yield ground.train(f"a method without end {number}", method=address, said="within 1 s")

    judged("code: what hangs", attacks())


def _file(ground: Ground, name: str, body: str, head: str) -> str:
    """The address of `mine` in a file: a body of it, or a whole file."""
    whole = f"{HEAD}{head}\n{body}\n" if body.startswith("    ") else f"{HEAD}{body}\n"
    return ground.file(name, whole.encode("utf-8", "surrogateescape")) + ":mine"
