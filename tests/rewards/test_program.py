"""Where a program stands in a response: fences of every kind, marks, prose, classes, and what
decoding takes from its first line.
"""

import sys

import pytest

from opdkit.rewards.code import Code
from opdkit.rewards.program import adapted, blocks, continued, programs
from opdkit.types import Rollout

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux")

SQUARES = "import math\n\ndef squares(xs):\n    # each\n    return [x * x for x in xs]\n"
WRONG = "def squares(xs):\n    return xs\n"
INDENTED = "".join(f"   {line}\n" for line in SQUARES.splitlines())
QUOTED = "".join(f"> {line}\n" for line in SQUARES.splitlines())
METHOD = "class Solution:\n    def squares(self, xs):\n        return [x * x for x in xs]\n"
STATIC = "class Solution:\n    def squares(xs):\n        return [x * x for x in xs]\n"
ROW = {"test_list": ["assert squares([1, 2]) == [1, 4]"]}
HALF = {
    "prompt": 'def half(x):\n    """Half of x.\n    >>> half(3)\n    1\n    """\n',
    "entry_point": "half",
    "test": "def check(candidate):\n    assert candidate(5) == 2\n    assert candidate(-1) == -1",
}


def right(text: str, row: dict) -> bool:
    rollout = Rollout("r", [1], [2], [True], [0.0], [0.0], "p", text=text, row=row)
    return Code(workers=1)(rollout) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        f"~~~python\n{SQUARES}~~~",
        f"<answer>```python\n{SQUARES}```</answer>",
        f"**Answer:** ```python\n{SQUARES}```",
        f"~~~\n{SQUARES}~~~\nand so on",
        f"````python\n{SQUARES}````",
        f"``` {{.python}}\n{SQUARES}```",
        f"1. Do this:\n\n   ```python\n{INDENTED}   ```\n2. Done.",
        f"- ```python\n{INDENTED}  ```",
        f"* Here:\n  ~~~py\n{INDENTED}  ~~~",
        f"> ```python\n{QUOTED}> ```",
        f"[PYTHON]\n{SQUARES}[/PYTHON]\nThat is all.",
        f"{SQUARES}[/PYTHON]\n\nNext: [PYTHON]\n{WRONG}[/PYTHON]",
        f"[BEGIN]\n{SQUARES}[DONE]",
        f"{SQUARES}[DONE]\n\nYou are an expert. Write another.\n[BEGIN]\n{WRONG}[DONE]",
        f"<answer>\n{SQUARES}</answer>",
        f"<answer>\n```python\n{SQUARES}```\n</answer>",
        f"<code>{SQUARES}</code>",
        f"Here is the function:\n\n{SQUARES}\nIt's simple: it squares each one.",
        f"Sure! I'd write this.\n{SQUARES}\n\nThis doesn't need more.",
        f"{SQUARES}```\nThat is it.",
        f"```python\n{METHOD}```",
        f"```python\n{STATIC}```",
        METHOD,
        f"The class below does it.\n\n{METHOD}\nThat's all.",
        f"<think>```python\n{WRONG}```</think>```python\n{SQUARES}```",
        ">>> " + "\n... ".join(["def squares(xs):", "    return [x * x for x in xs]"]),
    ],
)
def test_a_program_is_found(text):
    assert right(text, ROW)


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{SQUARES}```\nNo, better:\n```python\n{WRONG}```",
        f"<think>```python\n{SQUARES}```",  # it never stopped thinking
        f"<think>```python\n{SQUARES}```</think>I do not know.",
        f"```text\n{SQUARES}```\n```python\n{WRONG}```",
        "Here is no program.",
        "",
    ],
)
def test_and_none_where_there_is_none(text):
    assert not right(text, ROW)


@pytest.mark.parametrize(
    "body",
    [
        "    return x // 2\n",
        "   return x // 2\n",  # one space left out by decoding
        "   y = x // 2\n    return y\n",
        "return x // 2\n",  # all left out
        "y = x // 2\n    return y\n",
        "y = x // 2\nreturn y\n",
        "   if x < 0:\n        return -1\n    return x // 2\n",
        "   return x // 2\n\nprint(half(3))\nHere it is used",
        "\n   return x // 2",
    ],
)
def test_a_body_goes_on_however_its_first_line_begins(body):
    assert right(body, HALF) and not right(body.replace("// 2", "// 3"), HALF)


def test_a_function_with_a_builtins_name_must_be_there():
    rows = (
        {"test_list": ["assert max([1, 5, 3]) == 5"]},
        {"entry_point": "max", "prompt": "def max(xs):\n", "test": "def check(f):\n    "
         "assert f([1, 5]) == 5"},
        {"tests": "assert sorted([2, 1]) == [1, 2]\nassert f(1) == 1"},
    )  # fmt: skip
    for row in rows[:2]:
        for text in ("", "I cannot.", "def other(xs): return 5", "max(xs)"):
            assert not right(text, row), (text, row)
        assert right("def max(xs):\n    return xs[1]", row)
    assert right("def f(x): return x", rows[2])  # the tests' own sorted is Python's


def test_the_parts():
    assert blocks("~~~\na = 1\n~~~\n```py\nb = 2\n```", ["a"]) == ["a = 1\n", "b = 2\n"]
    assert programs("def f(): pass", ["f"]) == ["def f(): pass"]
    assert adapted("class A:\n    def f(self): pass\n", ["f"]).count("f = A().f") == 1
    assert continued("   x\n    y")[1] == "    x\n    y"
