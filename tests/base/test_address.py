"""`file.py:name`: the objects it finds and the mistakes it explains."""

import os

import pytest

from opdkit.base.address import is_address, load_address
from opdkit.base.errors import UserError

MINE = """
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Part:
    x: int = 1

def method(x=2):
    return Part(x)
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_names_in_one_file_share_its_classes(mine):
    assert load_address(f"{mine}:method")(3) == load_address(f"{mine}:Part")(3)
    assert load_address(f"{mine}:method").__module__.startswith("opdkit_file_mine_")


def test_an_edited_file_is_read_anew(mine):
    assert load_address(f"{mine}:method")() == load_address(f"{mine}:Part")(2)
    mine.write_text("def method():\n    return 'new'\n")
    assert load_address(f"{mine}:method")() == "new"


def test_relative_to_the_working_directory(mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    assert load_address("mine.py:method")(1).x == 1
    assert load_address(os.path.join(".", "mine.py") + ":method")(1).x == 1


def test_what_is_an_address():
    assert is_address("a.py:f") and is_address("dir/a.py:f")
    assert not any(
        map(is_address, ("math", "a.py", "regex:a.py", "opdkit.methods:opd", "openai/gsm8k:main"))
    )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mine.py", "is not an address: write file.py:name"),
        ("mine.py:", "is not an address"),
        ("mine.py:a b", "is not an address"),
        ("absent.py:f", "names the file absent.py, which is not there"),
        ("mine.py:methid", r"mine.py defines no 'methid'; did you mean 'method'\?"),
        ("syntax.py:f", r"fails when it runs: line 2: SyntaxError"),
        ("raises.py:f", r"fails when it runs: line 3: ZeroDivisionError: division by zero"),
        ("empty.py:f", "empty.py defines no 'f': it defines nothing"),
    ],
)
def test_mistakes(mine, monkeypatch, address, message):
    (mine.parent / "syntax.py").write_text("x = 1\ndef f(:\n")
    (mine.parent / "raises.py").write_text("import os\n\nx = 1 / 0\n")
    (mine.parent / "empty.py").write_text("")
    monkeypatch.chdir(mine.parent)
    with pytest.raises(UserError, match=message):
        load_address(address)


def test_a_file_that_failed_may_be_mended(mine):
    mine.write_text("x = 1 / 0")
    for _ in range(2):
        with pytest.raises(UserError, match="ZeroDivisionError"):
            load_address(f"{mine}:x")
    mine.write_text("x = 5")
    assert load_address(f"{mine}:x") == 5
