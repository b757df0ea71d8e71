"""Rewards of a person's own file: what they can do, what they are kept from, and how they ask
otherwise.
"""

import socket
import sys
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.rewards import load_reward, own, score
from opdkit.types import Rollout

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="rewards are confined by Linux")

FILE = """
import os
from dataclasses import dataclass
from pathlib import Path

WORDS = Path(__file__).with_name("words.txt").read_text().split()  # before any response is read

def known(rollout):
    return rollout.text in WORDS and rollout.row["answer"] == "x"

def evaluated(rollout):
    return float(eval(rollout.text))

def free(rollout):
    return float(eval(rollout.text))

free.confined = False

def odd(rollout):
    return {"none": None, "large": 10**400, "nan": float("nan"), "text": "1"}[rollout.text]

def ends(rollout):
    raise SystemExit(0)

@dataclass
class Batch:
    correct_from: float = 3.0
    def score_many(self, rollouts):
        return [len(r.text) / len(rollouts) for r in rollouts]

batch = Batch()
"""


def rollout(text: str, id: str = "r") -> Rollout:
    row = {"answer": "x"}
    return Rollout(id, [1], [2], [True], [0.0], [0.0], "p", text=text, row=row)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("yes no")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    tmp_path.chmod(0o777)
    return path


def values(file: Path, name: str, *texts: str) -> list[float | None]:
    rollouts = [rollout(text, str(i)) for i, text in enumerate(texts)]
    return [r.reward for r in score(rollouts, load_reward(f"{file}:{name}"))]


def test_functions_and_objects_are_called(file: Path) -> None:
    assert values(file, "known", "yes", "banana", "no") == [1.0, 0.0, 1.0]
    scored = score([rollout("abcd"), rollout("abcdefgh")], load_reward(f"{file}:batch"))
    assert [(r.reward, r.correct) for r in scored] == [(2.0, False), (4.0, True)]
    assert score([], load_reward(f"{file}:known")) == []


def test_what_a_model_wrote_can_do_no_harm_in_one(file: Path) -> None:
    trap = file.with_name("trap")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for text in (
            f"open({str(trap)!r}, 'w').write('x')",
            f"__import__('socket').create_connection(('127.0.0.1', {port}))",
            f"open({str(file)!r}).read()",
            "__import__('os').fork()",
            "__import__('os').kill(__import__('os').getppid(), 0) or 1",
        ):
            with pytest.raises(
                UserError, match=r"evaluated failed on rollout '0'.*confined = False"
            ):
                values(file, "evaluated", text)
        assert values(file, "evaluated", f"__import__('os').system('touch {trap}') == 0") == [0.0]
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not trap.exists()
    assert values(file, "evaluated", "'PATH' in os.environ") == [0.0]


def test_a_call_leaves_nothing_to_the_next(file: Path) -> None:
    texts = ["WORDS.append(1) or len(WORDS)"] * 3
    assert values(file, "evaluated", *texts) == [3.0] * 3
    assert values(file, "free", *texts) == [3.0, 4.0, 5.0]  # it asked for this process


def test_what_is_no_number_names_the_rollout(file: Path) -> None:
    for text, said in (("none", "None"), ("large", "1000"), ("nan", "nan"), ("text", "'1'")):
        with pytest.raises(UserError, match=rf"reward odd returned {said}.* for rollout '0'"):
            values(file, "odd", text)
    with pytest.raises(UserError, match="reward odd failed on rollout '1': KeyError: 'b'"):
        score([rollout("b", "1")], load_reward(f"{file}:odd"))
    with pytest.raises(UserError, match="reward ends failed on rollout '0': SystemExit"):
        values(file, "ends", "x")


def test_one_that_never_ends_is_ended(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "SECONDS", 0.2)
    with pytest.raises(UserError, match=r"failed on rollout '0': no result within 0.2 s"):
        values(file, "evaluated", "sum(iter(int, 1))")


def test_an_edit_is_seen(file: Path) -> None:
    assert values(file, "known", "yes") == [1.0]
    file.write_text(FILE.replace("rollout.text in WORDS", "rollout.text not in WORDS"))
    assert values(file, "known", "yes") == [0.0]


def test_objects_of_a_batch_need_no_call(file: Path) -> None:
    class Batch:
        def score_many(self, rollouts):
            return [1 / len(r.text) for r in rollouts]

    assert score([rollout("ab")], load_reward(Batch()))[0].reward == 0.5
    with pytest.raises(UserError, match="Batch failed on a batch of 1 rollouts, the first 'q'"):
        score([rollout("", "q")], load_reward(Batch()))
    with pytest.raises(UserError, match=r"not 3$"):
        load_reward(3)
