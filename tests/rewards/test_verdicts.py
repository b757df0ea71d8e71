"""What a program hands back is judged in the tests' process, as data: whatever object it makes, it
can only be right or wrong.
"""

from __future__ import annotations

import sys

import pytest

from opdkit.rewards.sandbox import Calls, Limits, Prints, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux")

AGREES = """
class A:
    def __getattr__(self, name): return lambda *a, **k: True
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __le__(self, other): return True
    __lt__ = __ge__ = __gt__ = __contains__ = __le__
    def __sub__(self, other): return 0
    __rsub__ = __and__ = __rand__ = __sub__
    def __getitem__(self, i):
        if i > 9: raise IndexError
        return self
    def __abs__(self): return 0
    def __bool__(self): return True
    __hash__ = None
def f(x): return A()
"""
SET = """
class S(set):
    def issubset(self, other): return True
    def difference(self, other): return set()
    def __le__(self, other): return True
    def __contains__(self, other): return True
    def __sub__(self, other): return set()
def f(x): return S([7])
"""
STR = """
class S(str):
    def startswith(self, other): return True
    def __eq__(self, other): return True
    def __contains__(self, other): return True
    __hash__ = str.__hash__
def f(x): return S('wrong')
"""
NAN = "def f(x): return "
FORGED = {
    "issubset of an object": (AGREES, "assert f(3).issubset({1})"),
    "startswith of an object": (AGREES, "assert f(3).startswith('a')"),
    "a method of its own": (AGREES, "assert f(3).matches('a')"),
    "a method, its error caught": (
        AGREES,
        "try:\n    good = f(3).startswith('a')\nexcept Exception:\n    good = True\nassert good",
    ),
    "at most": (AGREES, "assert f(3) <= {1}"),
    "at least, turned": (AGREES, "assert {1} >= f(3)"),
    "a difference of 0": (AGREES, "assert abs(f(3) - 2.5) < 1e-6"),
    "equal": (AGREES, "assert f(3) == 4"),
    "not unequal": (AGREES, "assert not f(3) != 4"),
    "in a list": (AGREES, "assert f(3) in [1, 2]"),
    "holds it": (AGREES, "assert 4 in f(3)"),
    "issubset of a set's heir": (SET, "assert f(3).issubset({1})"),
    "at most of a set's heir": (SET, "assert f(3) <= {1}"),
    "no difference of a set's heir": (SET, "assert f(3).difference({1}) == set()"),
    "minus of a set's heir": (SET, "assert not f(3) - {1}"),
    "a set's heir holds it": (SET, "assert 1 in f(3)"),
    "startswith of a text's heir": (STR, "assert f(3).startswith('r')"),
    "a text's heir is equal": (STR, "assert f(3) == 'right'"),
    "a text's heir holds it": (STR, "assert 'right' in f(3)"),
    "nan": (NAN + "float('nan')", "assert not abs(f(3) - 2.5) > 1e-6"),
    "nan raises nothing": (NAN + "float('nan')", "if abs(f(3) - 2.5) > 1e-6: raise ValueError"),
    "nan in a list": (NAN + "[float('nan')]", "assert not any(abs(x) > 1 for x in f(3))"),
    "nan of a complex number": (NAN + "complex('nan')", "assert not abs(f(3) - 1) > 1"),
    "nan of a decimal": (NAN + "__import__('decimal').Decimal('NaN')", "assert f(3) != 1"),
    "nan in an array": (
        NAN + "__import__('numpy').array([float('nan')])",
        "assert not (f(3) > 1).any()",
    ),
    "nan, its error caught": (
        NAN + "float('nan')",
        "try:\n    f(3)\nexcept Exception:\n    pass",
    ),
    "a class in a function's place": (
        "class f:\n    def __init__(self, x): pass\n    def issubset(self, other): return True",
        "assert f(3).issubset({1})",
    ),
}
TRIE = """
class Trie:
    def __init__(self): self.words = []
    def insert(self, word): self.words.append(word)
    def startswith(self, start): return any(w.startswith(start) for w in self.words)
    def count(self, word): return self.words.count(word)
"""
RIGHT = {
    "a set's heir, by its data": (SET, "assert f(3).issubset({7, 8}) and f(3) <= {7}"),
    "a set's heir is changed": (SET, "x = f(3)\nx.add(4)\nassert x == {7, 4}"),
    "nan where a test speaks of it": (
        NAN + "float('nan')",
        "import math\nassert math.isnan(f(3))",
    ),
    "a function": ("def f(n): return lambda x: x > n", "assert f(3)(4) and not f(3)(2)"),
    "a generator": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
    "an object's own data": (
        "class N: pass\ndef f(v):\n    n = N(); n.val, n.count = v, 2\n    return n",
        "assert f(3).val == 3 and f(3).count == 2",
    ),
    "a match": (
        "import re\ndef f(s): return re.match('(a)(b)', s)",
        "assert f('ab').group(1) == 'a'",
    ),
}


def calls(program: str, test: str = "assert f(3) == 4", name: str = "f") -> Calls:
    return Calls((program,), (test,), (name,))


def why(case: Calls | Prints, seconds: int = 5) -> str:
    """Nothing where it passes."""
    [verdict] = Sandbox(Limits(seconds, 1024), workers=1).run([case])
    return "" if verdict.right else verdict.why or "?"


@pytest.mark.parametrize("name", list(FORGED))
def test_objects_that_agree_with_everything_are_wrong(name: str) -> None:
    assert why(calls(*FORGED[name]))


@pytest.mark.parametrize("name", list(RIGHT))
def test_what_is_right_passes(name: str) -> None:
    assert why(calls(*RIGHT[name])) == ""


def test_a_class_that_the_tests_name_is_asked() -> None:
    test = "t = Trie()\nt.insert('abc')\nassert t.startswith('ab') and not t.startswith('x')\n"
    assert why(calls(TRIE, test + "assert t.count('abc') == 1", "Trie")) == ""


def test_a_result_of_its_method_is_not() -> None:
    solution = AGREES + "class Solution:\n    def g(self, x): return A()"
    assert "as if it were data" in why(
        calls(solution, "assert Solution().g(3).startswith('x')", "Solution")
    )


def test_inputs_programs_and_arguments_of_17_mib() -> None:
    size = 17 << 20
    assert why(Prints(("print(len(input()))",), ("a" * size,), (str(size),))) == ""
    assert why(calls(f"x = {'a' * size!r}\ndef f(x): return 4")) == ""
    assert why(calls("def f(x): return len(x)", f"assert f('a' * {size}) == {size}")) == ""
    assert why(calls("def f(x): return x", f"assert f({'a' * size!r}) == 'a' * {size}")) == ""


def test_what_is_larger_still_is_wrong_and_ends_nothing() -> None:
    size = 65 << 20
    assert "more than 67108864 characters" in why(Prints(("1",), ("a" * size,), ("",)))
    assert "more than 67108864 characters" in why(calls("#" * size))
    assert "too large to be handed over" in why(calls("def f(x): return 'a' * (65 << 20)"))
    assert why(calls("def f(x): return x + 1")) == ""


def test_the_disk_has_a_quota_that_no_speed_beats() -> None:
    """fallocate takes no time; files that are open have no name."""
    fast = "[os.posix_fallocate(os.open(str(i), 66), 0, 16 << 20) for i in range(900)]"
    unnamed = "[(os.write(os.open('a', 66), bytes(16 << 20)), os.unlink('a')) for i in range(58)]"
    for line in (fast, unnamed):
        said = why(calls(f"import os\ndef f(x): {line}"))
        assert said.startswith(("OSError: [Errno 28]", "PermissionError: [Errno 13]")), said


def test_what_lies_outside_is_not_seen() -> None:
    box = Sandbox(workers=1)
    box.check()
    if not box.programs.idle[-1].held["seeing"]:
        pytest.skip("not enforced on this machine")
    paths = ["/etc/passwd", "/proc", "/var", "/home"]
    seen = f"import os\ndef f(x): return [p for p in {paths} if os.path.exists(p)]"
    assert why(calls(seen, "assert f(3) == []")) == ""
