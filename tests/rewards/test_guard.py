"""What a model wrote reaches no scorer of a library as code, and could do nothing there if
it did.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.data import load_rows
from opdkit.rewards import guard, load_reward, score, workers
from opdkit.rewards.gym import ReasoningGym
from opdkit.rewards.math import Math, right
from opdkit.types import Rollout

JAIL = Path(workers.__file__).with_name("jail")
sys.path.append(str(JAIL))  # as where it is run by path

from arithmetic import NotArithmetic, checked  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scorers are confined by Linux")

# Each would leave the file TRAP, or turn its own score or a later one into 1, if anything evaluated
# it.
TOUCH = "__import__('os').system('touch TRAP')"
PATCH = "__import__('sys').modules['reasoning_gym'].dataset.ProceduralDataset.score_answer"
PAYLOADS = [
    TOUCH,
    f"[{TOUCH}, 1][1]",
    "open('TRAP', 'w').write(str(__import__('os').environ))",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', "
    "'TRAP'])",
    "(lambda: __import__('pathlib').Path('TRAP').touch())()",
    f"setattr({PATCH.rpartition('.')[0]}, 'score_answer', lambda *a: 1.0)",
    "__import__('os').write(3, b'[true, 1.0]') and __import__('os')._exit(0)",
    "__import__('socket').create_connection(('127.0.0.1', PORT))",
    f"sympify({TOUCH!r}) + Integer(1)",
    f"lambdify((), {TOUCH!r})()",
    f"exec({TOUCH!r})",
    "x.__class__.__init__.__globals__['__builtins__']['open']('TRAP', 'w')",
]


@contextmanager
def watched(folder: Path):
    """The payloads, and in the end: no trap was sprung, no connection came."""
    trap = folder / "trap"
    folder.chmod(0o777)  # an answer that ran as another user would leave it too
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        yield [text.replace("TRAP", str(trap)).replace("PORT", port) for text in PAYLOADS]
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not trap.exists()


def rollout(text: str, row: dict) -> Rollout:
    return Rollout("r", [1], [2], [True], [0.0], [0.0], "p", text=text, row=row)


def tasks() -> list[str]:
    factory = pytest.importorskip("reasoning_gym.factory")
    return sorted(factory.DATASETS)


MOST = 7  # payloads for a task that evaluates nothing
EVALUATE = (
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "number_sorting",
    "polynomial_multiplication",
)
EVALUATE += ("puzzle24", "simple_integration", "spiral_matrix", "string_insertion")


def test_no_answer_is_run_by_any_task(tmp_path: Path) -> None:
    """Payloads earn nothing, and a right and a wrong answer are scored after them as before."""
    assert len(tasks()) >= 106
    with watched(tmp_path) as payloads:
        for task in tasks():
            if task == "composite":  # of other tasks, which it asks to score
                continue
            [row] = load_rows(f"reasoning_gym:{task}?size=1&seed=1")
            plain = [rollout(f"<answer>{text}</answer>", row) for text in (row["answer"], "banana")]
            before = score(plain, ReasoningGym())
            tried = payloads if task in EVALUATE else payloads[:MOST]
            hostile = score(
                [rollout(f"<answer>{text}</answer>", row) for text in tried], ReasoningGym()
            )
            assert max(r.reward for r in hostile) == 0, task
            assert score(plain, ReasoningGym()) == before, task


def test_no_answer_is_run_by_math(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    with watched(tmp_path) as payloads:
        for text in payloads:
            for form in (
                rf"\boxed{{{text}}}",
                f"The answer is ${text}$",
                rf"\boxed{{\frac{{{text}}}{{2}}}}",
                f"#### {text}",
            ):
                assert not right(form, "72") and not right(form, r"\frac{\sqrt{3}}{2}")
        assert right(r"\boxed{1+x}", "x+1") and not right(r"\boxed{banana}", "x+1")


ARITHMETIC = [
    "1",
    "-3.5e2",
    "[1, (2, 'a')]",
    "0xff & (3 + 5*7)",
    "[[1, 0], [0, 2]]",
    "{'a': [1]}",
    "94*4 - 61 - 6",
    "True",
    "1 < 2",
]
SYMPY = [
    "Integer (94 )*Integer (4 )",
    "Symbol ('x' )**Integer (2 )",
    "sqrt (x )+pi",
    "Function ('f' )(Symbol ('x' ))",
]
PYTHON = [
    "x",
    "().__class__",
    "'a'.format",
    "[i for i in (1,)]",
    "f'{1}'",
    "(y := 1)",
    "x[0]",
    "*a",
    "lambda: 1",
    "1 if 1 else 2",
    "int",
]
CALLS = ["sympify('1')", "S('1')", "preview(1)", "Function('f')('g')(1)()", "eval('1')", "print(1)"]


@pytest.mark.parametrize("text", [*ARITHMETIC, *SYMPY])
def test_arithmetic_is_evaluated(text: str) -> None:
    sympy = pytest.importorskip("sympy")
    assert checked(text, {"x": sympy.Symbol("x")}) == text


@pytest.mark.parametrize("text", [*PAYLOADS, *PYTHON, *CALLS, 5, "1" * 30_000])
def test_nothing_else_is(text: str) -> None:
    with pytest.raises((NotArithmetic, SyntaxError)):
        checked(text, {"x": print, "eval": eval, "int": int, "print": print})


# What a scorer could be made to do if an answer ran in it: in a process of the jail, by a scorer
# that does it.
HOSTILE = """
import json, os, pickle, socket, subprocess, sys, tempfile
jail_folder, outside, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path[:0] = [jail_folder]
import cell, scores
STATE = []

def state():
    STATE.append(1)
    return float(len(STATE))

def program():
    exec("STATE.append(1)")
    return float(len(STATE))

DOES = {
    "state": state, "program": program,
    "write": lambda: float(open(f"{outside}/trap", "w").write("x")),
    "own": lambda: float(open("own", "w").write("x")),
    "network": lambda: float(bool(socket.create_connection(("127.0.0.1", port)))),
    "process": lambda: float(subprocess.run(["true"]).returncode == 0),
    "fork": lambda: float(bool(os.fork())),
    "parent": lambda: float(os.kill(os.getppid(), 0) is None),
    "environment": lambda: float(len(open(f"/proc/{os.getppid()}/environ", "rb").read())),
    "memory": lambda: float(len(bytearray(64 << 30))),
    "hang": lambda: [0 for _ in iter(int, 1)],
    "garbage": lambda: os.write(3, b"not JSON") and os._exit(0),
    "much": lambda: os.write(3, b"1" * (1 << 20)),
    "object": lambda: {"reward": 1.0},
    "exit": lambda: os._exit(0),
}
work = scores.Work.__new__(scores.Work)
work.jail, held = cell.confined(tempfile.mkdtemp(dir=outside), [])
work.prepare = lambda name: DOES[name]
out = {name: work(pickle.dumps(((name,), 1.0)).hex()) for name in [*DOES, "state"]}
print(json.dumps({"out": out, "held": held}))
"""


def test_what_ran_in_a_scorer_could_do_no_harm(tmp_path: Path) -> None:
    """Each call has a fresh state, an empty folder of its own, no network, processes, environment
    or files, and limits.
    """
    tmp_path.chmod(0o777)
    commands, ours = os.pipe()  # it works for as long as this end is open
    with socket.create_server(("127.0.0.1", 0)) as server:
        run = [
            sys.executable,
            "-c",
            HOSTILE,
            str(JAIL),
            str(tmp_path),
            str(server.getsockname()[1]),
        ]
        said = subprocess.run(run, capture_output=True, text=True, check=True, stdin=commands)
    os.close(ours)
    os.close(commands)
    told = json.loads(said.stdout)
    if not all(told["held"].get(name) for name in workers.NEEDED):
        pytest.skip("this machine cannot confine programs, and the rewards refuse")
    out = told["out"]
    assert out.pop("state") == [True, 1.0]  # the second time as the first
    assert out.pop("own") == [True, 1.0]
    assert [name for name, (good, _) in out.items() if good] == []
    assert not (tmp_path / "trap").exists()
    assert "may not" in out["program"][1] or "not run as a program" in out["program"][1]
    assert "no result within 1 s" in out["hang"][1]


def test_scorers_have_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    worker = workers.Worker(Math().guard.jail)
    names = {
        line.split("=")[0]
        for line in Path(f"/proc/{worker.process.pid}/environ").read_text().split("\0")
    }
    worker.end()
    threads = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
    assert names <= {"", "PYTHONHASHSEED", "LD_LIBRARY_PATH", *threads}


def test_a_machine_that_cannot_confine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(workers, "NEEDED", ("network", "moonlight"))
    monkeypatch.setattr(workers, "HELD", {**workers.HELD, "moonlight": "no moonlight"})
    with pytest.raises(
        UserError,
        match=r"reward 'math'.*cannot be confined. Not enforced: no "
        r"moonlight.*Math\(unprotected=True\)",
    ):
        load_reward("math")
    Math(unprotected=True).check()
    assert (
        Math(unprotected=True)(
            rollout(r"\boxed{\frac{3}{\sqrt{2}}}", {"answer": r"\frac{3\sqrt{2}}{2}"})
        )
        == 1.0
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match=r"reward 'reasoning_gym'.*only Linux can confine that"):
        ReasoningGym().check()


def test_patience_falls_with_answers_that_hang_and_comes_back() -> None:
    """64 of them on two cores: two at 2 s of a processor each, the others at 0.2 s, in all 8 s for
    each core.
    """
    patience = guard.Patience()
    taken = []
    for _ in range(32):  # two at once
        taken += [patience.seconds()] * 2
        patience.one_hung()
        patience.one_hung()
    assert taken[:2] == [guard.SECONDS] * 2 and max(taken[2:]) < 0.25 and min(taken) == guard.LEAST
    assert sum(taken) / 2 < 10
    patience.since -= 60 * guard.CALM
    assert patience.seconds() == pytest.approx(guard.SECONDS)


def test_an_answer_that_hangs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    patience = guard.Patience()
    monkeypatch.setattr(guard, "_patience", patience)
    assert not right(r"\boxed{x + 999999999!}", "x+1") and patience.hung == 1
    assert right(r"\boxed{1 + x}", "x+1") and patience.hung <= 1


def test_nan_from_a_scorer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    [row] = load_rows("reasoning_gym:chain_sum?size=1&seed=1")
    monkeypatch.setattr(guard.Guard, "__call__", lambda *a, **k: float("nan"))
    for partial in (False, True):
        [scored] = score([rollout("4", row)], ReasoningGym(partial=partial))
        assert (scored.reward, scored.correct) == (0.0, False)
