"""The reward `code`: every format, where the program stands in a response, and what crosses between
tests and program.
"""

import json
import sys
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.data import load_rows
from opdkit.rewards import load_reward, score
from opdkit.rewards.code import Code, case
from opdkit.rewards.sandbox import Limits
from opdkit.types import Rollout

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux")
HUMAN_EVAL = Path(__file__).parents[2] / "../shared/data/HumanEval.jsonl.gz"

COUNT = {  # HumanEval's columns
    "task_id": "HumanEval/0",
    "prompt": "from typing import List\n\n\ndef half(x: int) -> int:\n    return x // 2\n\n\n"
    'def count(words: List[str], n: int) -> int:\n    """ How many words are longer than '
    'half of n.\n    >>> count(["a"], 0)\n    1\n    """\n',
    "entry_point": "count",
    "canonical_solution": "    return sum(len(w) > half(n) for w in words)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(['a', 'bcd'], 4) "
    "== 1\n    assert candidate([], 4) == half(0)\n    assert candidate(['abc'] * 3, 2) == "
    "3\n",
}
FULL = "def count(words: List[str], n):\n    return sum(len(w) > half(n) for w in words)\n"
SQUARE = {  # MBPP's
    "task_id": 2,
    "text": "Write a function to square the numbers of a list.",
    "code": "def squares(xs):\r\n  return [x * x for x in xs]",
    "test_setup_code": "",
    "test_list": ["assert squares([1, 2]) == [1, 4]", "assert set(squares([-3])) == set([9])"],
    "challenge_test_list": ["assert squares([]) == []"],
}


def rollout(text: str, row: dict, id: str = "r") -> Rollout:
    return Rollout(id, [1], [2], [True], [0.0], [0.0], "p", text=text, row=row)


def fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


def right(text: str, row: dict, **settings) -> bool:
    return Code(workers=1, **settings)(rollout(text, row)) == 1.0


def own(program: str, tests: str, **columns) -> bool:
    return right(fenced(program), {"tests": tests, **columns})


# ------------------------------------------------------------------------------------------ formats


def test_human_eval():
    assert right(COUNT["canonical_solution"], COUNT)
    assert right(COUNT["prompt"] + COUNT["canonical_solution"], COUNT)
    assert right(fenced(FULL), COUNT)  # with the prompt's imports and functions
    assert right(
        "It is simple.\n\n"
        + fenced("import math\n" + FULL)
        + "\n\nFor example:\n"
        + fenced("print(count([], 1))"),
        COUNT,
    )
    assert not right(fenced(FULL.replace("half(n)", "n")), COUNT)
    assert not right("    pass\n", COUNT)
    assert not right("", COUNT)
    assert not right("I cannot do that.", COUNT)


def test_a_base_model_goes_on_after_the_body():
    for after in (
        "\n\nprint(count(",
        "\nHere is why this works: it's",
        "\n```\n\nThis",
        "\n```\nand\n```python\nprint(1)\n```",
        "\n<|end",
    ):
        assert right(COUNT["canonical_solution"] + after, COUNT), after


def test_the_prompts_own_helpers_are_not_the_programs():
    """HumanEval/32's test calls `poly` of the prompt: a program with a poly of its own does not
    change what the test computes.
    """
    row = {**COUNT, "test": "def check(candidate):\n    assert half(candidate(['a'] * 6, 0)) == 3"}
    assert right(fenced(FULL), row)
    assert not right(fenced("def half(x): return 3\ndef count(words, n): return 0"), row)


def test_a_question_in_words_and_a_method_as_entry_point():
    row = {
        "prompt": "Add two numbers.",
        "entry_point": "Solution().add",
        "test": "def check(candidate):\n    assert candidate(a=1, b=2) == 3",
    }
    assert right(
        fenced("class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b"),
        row,
    )
    assert not right(fenced("class Solution:\n    def add(self, a, b): return a - b"), row)
    assert not right(fenced("def add(a, b): return a + b"), row)


def test_mbpp():
    assert right(fenced(SQUARE["code"]), SQUARE) and right(SQUARE["code"], SQUARE)
    assert not right(fenced("def squares(xs): return [abs(x) for x in xs]"), SQUARE)
    assert not right(fenced("def square(xs): return [x * x for x in xs]"), SQUARE)
    empty = fenced("def squares(xs): return [x * x for x in xs] or None")
    assert right(empty, SQUARE) and not right(empty, SQUARE, challenge=True)


def test_mbpp_setup_and_imports():
    setup = {
        "test_setup_code": "root = Node(1)\r\nroot.left = Node(2)\r\nroot.left.left = Node(3)",
        "test_list": ["assert height(root) == 3"],
    }
    tree = (
        "class Node:\n    def __init__(self, x): self.x, self.left = x, None\n"
        "def height(n): return 1 + height(n.left) if n else 0"
    )
    assert right(fenced(tree), setup) and not right(fenced(tree.replace("1 +", "2 +")), setup)
    near = {
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(root2(2), 1.41421356, rel_tol=1e-6)"],
    }
    assert right("def root2(x): return x ** 0.5", near)
    assert not right("class math: isclose = lambda *a, **k: True\ndef root2(x): return 1", near)
    assert not right(
        "class math: isclose = lambda *a, **k: True\ndef root2(x): return 1",
        {"test_list": near["test_list"]},
    )  # not imported
    assert right("import math\ndef root2(x): return math.sqrt(x)", {"test_list": near["test_list"]})


def test_a_function_named_like_one_of_pythons():
    row = {"test_list": ["assert sum(10, 15) == 6", "assert sum(100, 150) == 93"]}
    program = (
        "def sum(a, b):\n    s = 0\n    for i in range(1, a + 1):\n"
        "        if a % i == 0 and b % i == 0: s += i\n    return s"
    )
    assert right(program, row) and not right("def sum(a, b): return 6", row)
    both = {"code": program, "test_list": ["assert set([sum(10, 15)]) == set([6])"]}
    assert right(program, both) and not right("def sum(a, b): return 5\nset = lambda x: 1", both)


def test_lines_of_ones_own():
    tests = (
        "s = Stack()\ns.push(1)\nassert s.pop() == 1\nfor x in range(3):\n    s.push(x)\n"
        "    assert s.pop() == x\nassert len(s) == 0"
    )
    stack = "class Stack(list):\n    push = list.append"
    assert own(stack, tests)
    plain = (
        "class Stack:\n    def __init__(self): self.a = []\n"
        "    def push(self, x): self.a.append(x)\n"
    )
    assert own(
        plain + "    def pop(self): return self.a.pop()\n    def __len__(self): return len(self.a)",
        tests,
    )
    assert not own("class Stack(list):\n    push = list.append\n    def pop(self): return 1", tests)
    assert right(fenced("def f(): return 1"), {"tests": ["assert f() == 1", "assert f() < 2"]})
    function = "def test_it():\n    assert f() == 1"
    assert own("def f(): return 1", function) and not own("def f(): return 2", function)
    assert own("def f(): return 1", "def check(g):\n    assert g() == 1\ncheck(f)")


def test_standard_input_and_output():
    row = {
        "input_output": json.dumps({"inputs": ["3\n1 2 3\n", "1\n5\n"], "outputs": ["6\n", "5"]})
    }
    assert right(fenced("n = int(input())\nprint(sum(map(int, input().split())))"), row)
    assert right(
        fenced("import sys\nprint(sum(map(int, sys.stdin.read().split()[1:])), file=sys.stdout)"),
        row,
    )
    assert right(
        fenced(
            "def main():\n    print(sum(map(int, open(0).read().split()[1:])))\nif __name__ == "
            "'__main__':\n    main()"
        ),
        row,
    )
    assert right(
        fenced("import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()[1:]))).encode())"),
        row,
    )
    assert right(
        fenced(
            "import threading\nthreading.Thread(target=lambda: print(sum(map(int, "
            "open(0).read().split()[1:])))).start()"
        ),
        row,
    )
    assert right(fenced("input(); print(sum(map(int, input().split()))); exit()"), row)
    assert not right(fenced("print(6)"), row)
    assert not right(
        fenced("n = int(input())\nprint(sum(map(int, input().split())))\nraise ValueError"), row
    )
    assert not right(fenced("n = int(input())\nprint('Sum:', sum(map(int, input().split())))"), row)


def test_numbers_printed_with_a_point_may_be_rounded():
    row = {"input_output": {"inputs": ["2\n"], "outputs": ["1.41421356 2\nok"]}}
    assert right("print(2 ** 0.5, 2)\nprint('ok')", row) and right(
        "print('1.4142135', '2 ')\nprint('ok\\n')", row
    )
    assert not right("print(1.4143, 2)\nprint('ok')", row) and not right(
        "print(1.41421356, 2.0)\nprint('ok')", row
    )


def test_functions_of_apps_and_livecodebench():
    apps = {
        "input_output": {"fn_name": "add", "inputs": [[1, 2], ["a", "b"]], "outputs": [[3], ["ab"]]}
    }
    assert right(fenced("def add(a, b): return a + b"), apps)
    assert right(fenced("class Solution:\n    def add(self, a, b): return a + b"), apps)
    assert not right(fenced("def add(a, b): return 3"), apps)
    digits = {"input_output": {"fn_name": "text", "inputs": [[1]], "outputs": ["1"]}}
    assert right(fenced("def text(x): return str(x)"), digits) and not right(
        fenced("def text(x): return x"), digits
    )
    live = {
        "input_output": json.dumps(
            {"fn_name": "pair", "inputs": ['[1, 2]\n"x"'], "outputs": ['[["x", 1], ["x", 2]]']}
        )
    }
    assert right(
        fenced("class Solution:\n    def pair(self, xs, s): return [[s, x] for x in xs]"), live
    )


def test_partial_credit():
    half = rollout(fenced("def squares(xs): return [x * x if x > 0 else 0 for x in xs]"), SQUARE)
    assert (Code(workers=1)(half), Code(workers=1, partial=True)(half)) == (0.0, 0.5)
    [scored] = score([half], Code(workers=1, partial=True))
    assert scored.reward == 0.5 and scored.correct is False


def test_rows_without_tests_and_tests_that_test_nothing():
    def refused(row: dict) -> str:
        with pytest.raises(UserError) as caught:
            case(rollout("x", row, id="q7"))
        return str(caught.value)

    assert refused({"prompt": "?"}).startswith(
        "rollout 'q7': the reward 'code' reads tests from the row's columns test and entry_point"
    )
    assert "assert nothing" in refused({"tests": "f(1)"})
    assert "call nothing of the program's" in refused({"tests": "assert 1 + 1 == 2"})
    assert "are not Python" in refused({"tests": "assert f(1 == 2"})
    assert "must be" in refused({"input_output": {"inputs": ["1"], "outputs": []}})


# --------------------------------------------------------------------------------------- a response


@pytest.mark.parametrize(
    "text",
    [
        fenced(FULL),
        fenced(FULL, ""),
        fenced(FULL, "py"),
        fenced(FULL, "Python"),
        "<think>\n" + fenced("def count(words, n): return 7") + "\n</think>\n" + fenced(FULL),
        fenced("def count(words, n): return 7") + "\nNo, better:\n" + fenced(FULL),
        fenced(FULL) + "\n" + fenced("$ python count.py", "bash"),
        fenced(FULL) + "\n" + fenced("assert count([], 1) == 0"),
        "```python\n" + FULL,  # cut
        "1. Do this:\n\n   ```python\n" + FULL + "   ```\n",
        fenced("from typing import *\n" + FULL),
        fenced("from __future__ import annotations\n" + FULL.replace("half(n)", "n // 2")),
        fenced("count = lambda words, n: sum(len(w) > n // 2 for w in words)"),
    ],
)
def test_where_the_program_stands(text):
    assert right(text, COUNT)


# ---------------------------------------------------------------- between the tests and the program


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(): return [1, (2, 'a'), {3: {4}}, b'x', None, True, 1.5, 2j, -0.0, 10**30, "
         "frozenset([1]), range(3), '\\ud800é']",
         "assert f() == [1, (2, 'a'), {3: {4}}, b'x', None, True, 1.5, 2j, -0.0, 10**30, "
         "frozenset([1]), range(3), '\\ud800é']\nassert type(f()[1]) is tuple and f()[5] is True"),
        ("def f(x): x.sort(); x.append(9)", "a = [2, 1]; assert f(a) is None and a == [1, 2, 9]"),
        ("def f(d, *, more): d['k'] = 1; more.add(2)", "d, s = {}, {1}; f(d, more=s); assert d == "
                                                       "{'k': 1} and s == {1, 2}"),
        ("def f(g, xs): return [g(x) for x in xs]", "n = 10; assert f(lambda x: x + n, [1, 2]) == "
                                                    "[11, 12]"),
        ("def f(n):\n    for i in range(n): yield i * i", "assert list(f(3)) == [0, 1, 4] and "
                                                          "next(f(1)) == 0 and 4 in f(3)"),
        ("def f(xs): return map(str, xs)", "assert list(f(i for i in (1, 2))) == ['1', '2']"),
        ("from collections import *\ndef f(s): return Counter(s), OrderedDict(a=1), "
         "defaultdict(int, a=1), deque([1])",
         "from collections import deque; assert f('aab') == ({'a': 2, 'b': 1}, {'a': 1}, {'a': 1}, "
         "deque([1]))"),
        ("from fractions import *\nfrom decimal import *\nfrom datetime import *\n"
         "def f(x): return Fraction(x), Decimal(x), date(x, 1, 2), timedelta(x)",
         "from fractions import *\nfrom decimal import *\nfrom datetime import *\n"
         "assert f(3) == (Fraction(3), Decimal(3), date(3, 1, 2), timedelta(3))"),
        ("def f(d): return d.year, type(d).__name__", "import datetime; assert "
                                                      "f(datetime.datetime(2020, 1, 2, 3)) == "
                                                      "(2020, 'datetime')"),
        ("def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
         "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == "
         "'negative'"),
        ("class Bad(KeyError): pass\ndef f(): raise Bad('x')", "try:\n    f()\n    assert "
                                                               "False\nexcept KeyError: pass"),
        ("class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return "
         "V(self.x + o.x)\n    def __eq__(self, o): return self.x == o.x\n    def __len__(self): "
         "return self.x\n    def __getitem__(self, i): return i * self.x\n    def __repr__(self): "
         "return f'V({self.x})'",
         "a = V(1) + V(2); assert a == V(3) and a.x == 3 and len(a) == 3 and a[2] == 6 and repr(a) "
         "== 'V(3)' and isinstance(a, V)\na.x = 5; assert a.x == 5 and a != V(3) and bool(V(0)) is "
         "False"),
        ("class C:\n    def __enter__(self): return 5\n    def __exit__(self, *e): self.done = "
         "True",
         "c = C()\nwith c as x:\n    assert x == 5\nassert c.done"),
        ("import enum\nclass E(enum.Enum):\n    A = 1\nclass I(enum.IntEnum):\n    B = 2\ndef f(): "
         "return E.A, I.B", "assert f() == (E.A, 2)"),
        ("def f(t, x): return t(x)", "assert f(int, '3') == 3 and f(str, 3) == '3'"),
        ("def f(head):\n    last = None\n    while head: head.next, last, head = last, head, "
         "head.next\n    return last",
         "class Node:\n    def __init__(self, x, next=None): self.x, self.next = x, next\nend = "
         "f(Node(1, Node(2, Node(3))))\nassert [end.x, end.next.x, end.next.next.x, "
         "end.next.next.next] == [3, 2, 1, None]"),
        ("import numpy as np\ndef f(a): return a * 2, a.mean(), (a > 1).any()",
         "import numpy as np\na, m, b = f(np.array([1.0, 2.0]))\n"
         "assert a.tolist() == [2.0, 4.0] and m == 1.5 and b and a.dtype == float"),
        ("class L(list): pass\nclass D(dict):\n    def __missing__(self, k): return 7\ndef f(): "
         "return L([1]), D(a=1)",
         "x, d = f(); assert x == [1] and x != [2] and d == {'a': 1} and d['b'] == 7; x.append(2); "
         "assert x == [1, 2] and [1, 2] == x"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 0\ndef f(): return "
         "P(3)", "assert f() == P(3) and f().x == 3"),
        ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass "
         "P:\n    x: int = 0", "assert P().x == 0"),
    ],
)  # fmt: skip
def test_what_tests_see_is_what_they_would_see_in_one_process(program, tests):
    names: dict = {"__name__": "one"}
    sys.modules["one"] = sys.modules[__name__]
    exec(program, names)
    exec(tests, names)
    reward = Code(workers=1)
    [verdict] = reward.verdicts([rollout(fenced(program), {"tests": tests})])
    assert verdict.right, verdict.why


# -------------------------------------------------------------------------------------- as a reward


def test_by_name_in_parallel_and_in_order():
    reward = load_reward("code")
    assert reward == Code()
    texts = [fenced(f"def squares(xs): return [x * x for x in xs][:{n}]") for n in range(4)] * 3
    scored = score([rollout(text, SQUARE, id=str(i)) for i, text in enumerate(texts)], reward)
    assert [r.reward for r in scored] == [0.0, 0.0, 1.0, 1.0] * 3
    assert [(r.id, r.correct) for r in scored[:3]] == [("0", False), ("1", False), ("2", True)]
    assert score([], reward) == []


def test_limits_are_the_users():
    slow = rollout("def squares(xs):\n    while True: pass", SQUARE)
    assert "killed" in Code(Limits(seconds=1), workers=1).verdicts([slow])[0].why
    large = rollout(
        "data = bytearray(300 << 20)\ndef squares(xs): return [x * x for x in xs]", SQUARE
    )
    assert [Code(Limits(memory=m), workers=1)(large) for m in (256, 1024)] == [0.0, 1.0]


def test_a_reward_must_value_every_rollout():
    class Short:
        def __call__(self, rollout):
            return 1.0

        def score_many(self, rollouts):
            return [1.0]

    with pytest.raises(UserError, match="Short gave 1 values for 2 rollouts"):
        score([rollout("a", {}), rollout("b", {})], Short())


def test_columns_of_code_data():
    [row] = load_rows([SQUARE])
    assert (row["prompt"], row["response"], row["id"]) == (SQUARE["text"], SQUARE["code"], "2")
    [row] = load_rows([COUNT])
    assert (row["prompt"], row["response"], row["answer"]) == (
        COUNT["prompt"],
        COUNT["canonical_solution"],
        None,
    )
    with pytest.raises(UserError, match="no prompt"):
        load_rows([{"text": "running text"}])


@pytest.mark.skipif(not HUMAN_EVAL.exists(), reason="HumanEval is not here")
def test_human_evals_own_solutions_pass_and_empty_ones_do_not():
    rows = load_rows(HUMAN_EVAL)
    reward = Code()
    assert sum(reward.score_many([rollout(row["canonical_solution"], row) for row in rows])) == 164
    assert (
        sum(
            reward.score_many(
                [rollout(fenced(row["prompt"] + row["canonical_solution"]), row) for row in rows]
            )
        )
        == 164
    )
    assert sum(reward.score_many([rollout("    pass\n", row) for row in rows])) == 0
