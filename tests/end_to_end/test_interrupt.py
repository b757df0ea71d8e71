"""SIGTERM and SIGHUP end a run as Ctrl-C does: saved, with the usual exit status, and resumed it is
the run that was never interrupted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opdkit import distill
from opdkit.base.interrupt import SIGNALS, Stopped, held, status, stoppable
from opdkit.run.settings import make_run
from opdkit.train import checkpoint as checkpoints
from opdkit.train.student import Student
from tests.end_to_end.conftest import Shop
from tests.end_to_end.crash import assert_same, in_child

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
REWARD = """
import time
from pathlib import Path

def even(rollout):
    armed = Path({armed!r})
    if rollout.id.startswith("4/") and armed.exists():  # a rollout of the fifth step
        armed.with_name("ready").touch()
        while armed.exists():
            time.sleep(0.01)
    return float(sum(rollout.tokens) % 2 == 0)

even.confined = False  # it looks at files and waits
"""
SCRIPT = """
import sys, yaml, opdkit
stored = yaml.safe_load(open(sys.argv[1]))
given = {name: value for name, value in stored.items() if value is not None}
given["prompts"] = given.pop("data")
try:
    opdkit.distill(**given)
finally:
    print("the end is reached", flush=True)
"""
COMMAND = ("-m", "opdkit", "train")


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    """All signals as a program finds them, whatever runs these tests: a shell that started them
    behind itself has Ctrl-C ignored.
    """
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def values(shop: Shop, folder: Path) -> dict[str, Any]:
    """Six steps, saved every third; while there is a file `armed`, the fifth waits."""
    (folder / "reward.py").write_text(REWARD.format(armed=str(folder / "armed")))
    return shop.values(
        folder / "run",
        steps=6,
        checkpoint={"every": 3},
        reward=f"{folder / 'reward.py'}:even",
        sample_every=2,
        method="opd",
    )


@pytest.fixture(scope="module")
def unbroken(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert in_child(values(shop, folder)) == 0
    return folder / "run"


def start(
    shop: Shop, folder: Path, how: tuple[str, ...] = COMMAND, ignored: tuple[int, ...] = ()
) -> subprocess.Popen[str]:
    """A run in a process of its own that has come to its fifth step."""
    (folder / "armed").touch()
    (folder / "run.yaml").write_text(make_run(values(shop, folder)).yaml())

    def decide() -> None:
        for number in (INT, TERM, HUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    child = subprocess.Popen(
        [sys.executable, *how, str(folder / "run.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=decide,
    )
    while not (folder / "ready").exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    return child


def newest(folder: Path) -> str:
    found = checkpoints.newest(folder / "run")
    assert found is not None
    return found.name


@pytest.mark.parametrize(
    ("number", "code"), [(INT, 130), (TERM, 143), (HUP, 129)], ids=["int", "term", "hup"]
)
def test_a_signal_saves_the_run(
    shop: Shop, tmp_path: Path, unbroken: Path, number: int, code: int
) -> None:
    child = start(shop, tmp_path)
    child.send_signal(number)
    _, said = child.communicate()
    assert child.returncode == code
    assert (
        said.endswith("opdkit: interrupted; continue with --resume\n") and "Traceback" not in said
    )
    assert newest(tmp_path) == "checkpoint-4"
    (tmp_path / "armed").unlink()
    assert in_child(values(shop, tmp_path), resume=True) == 0
    assert_same(tmp_path / "run", unbroken)


def test_a_signal_that_is_ignored_stays_ignored(shop: Shop, tmp_path: Path, unbroken: Path) -> None:
    """As under nohup: the terminal's end changes nothing."""
    child = start(shop, tmp_path, ignored=(HUP,))
    child.send_signal(HUP)
    (tmp_path / "armed").unlink()
    child.communicate()
    assert child.returncode == 0
    assert_same(tmp_path / "run", unbroken)


def test_a_program_that_calls_distill_ends_with_the_signals_status(
    shop: Shop, tmp_path: Path, unbroken: Path
) -> None:
    child = start(shop, tmp_path, ("-c", SCRIPT))
    child.send_signal(TERM)
    out, said = child.communicate()
    assert (
        child.returncode == 143 and out.endswith("the end is reached\n") and "Traceback" not in said
    )
    assert newest(tmp_path) == "checkpoint-4"
    (tmp_path / "armed").unlink()
    assert in_child(values(shop, tmp_path), resume=True) == 0
    assert_same(tmp_path / "run", unbroken)


# ---------------------------------------------------------------------------------- in this process


def raising(number: int, at: str = "4/") -> Callable[[Any], float]:
    """A reward during which a signal comes, once."""
    came: list[str] = []

    def reward(rollout: Any) -> float:
        if rollout.id.startswith(at) and not came:
            came.append(rollout.id)
            signal.raise_signal(number)
        return float(sum(rollout.tokens) % 2 == 0)

    return reward


def train(shop: Shop, folder: Path, reward: Any) -> None:
    given = values(shop, folder)
    prompts = given.pop("data")
    distill(**{**given, "prompts": prompts, "reward": reward})


@pytest.mark.parametrize("number", [TERM, HUP])
def test_handlers_are_as_before_and_a_second_signal_waits_for_the_checkpoint(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    finish = checkpoints._finish

    def interrupted(folder: Path) -> None:
        if folder.name.endswith("checkpoint-4"):
            signal.raise_signal(TERM)
        finish(folder)

    monkeypatch.setattr(checkpoints, "_finish", interrupted)
    with pytest.raises(Stopped) as caught:
        train(shop, tmp_path, raising(number))
    assert caught.value.code == 143 and newest(tmp_path) == "checkpoint-4"
    assert [signal.getsignal(s) for s in (TERM, HUP)] == [signal.SIG_DFL] * 2


def test_a_signal_while_a_checkpoint_that_is_due_is_written_waits_too(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = checkpoints._finish
    monkeypatch.setattr(
        checkpoints, "_finish", lambda folder: (signal.raise_signal(TERM), finish(folder))
    )
    with pytest.raises(Stopped):
        train(shop, tmp_path, raising(TERM, at="none"))
    assert newest(tmp_path) == "checkpoint-3"


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_signal_while_the_weights_move_waits_for_the_step(
    shop: Shop, tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Before the fifth step is sampled the fourth is saved, once it has moved weights the fifth."""
    step, came = Student.step, []

    def interrupted(student: Student) -> None:
        step(student)
        if student.updates == 5 and not came:
            came.append(5)
            signal.raise_signal(number)

    monkeypatch.setattr(Student, "step", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(shop, tmp_path, values(shop, tmp_path)["reward"])
    assert status(caught.value) == 128 + number and newest(tmp_path) == "checkpoint-5"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5
    assert in_child(values(shop, tmp_path), resume=True) == 0
    assert_same(tmp_path / "run", unbroken)


def test_a_handler_of_the_program_stays_in_charge(shop: Shop, tmp_path: Path) -> None:
    """One that only notes the signal lets the run go on; one that raises KeyboardInterrupt saves
    it.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "on").mkdir()
    signal.signal(TERM, note)
    train(shop, tmp_path / "on", raising(TERM))
    assert (
        noted == [TERM]
        and newest(tmp_path / "on") == "checkpoint-6"
        and signal.getsignal(TERM) is note
    )
    (tmp_path / "off").mkdir()
    signal.signal(TERM, stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(shop, tmp_path / "off", raising(TERM))
    assert (
        status(caught.value) == 130
        and newest(tmp_path / "off") == "checkpoint-4"
        and signal.getsignal(TERM) is stop
    )


def test_it_is_both_kinds_of_end() -> None:
    assert (
        issubclass(Stopped, KeyboardInterrupt)
        and issubclass(Stopped, SystemExit)
        and not issubclass(Stopped, Exception)
    )
    assert [status(stop) for stop in (KeyboardInterrupt(), Stopped(TERM), Stopped(HUP))] == [
        130,
        143,
        129,
    ]


def test_other_threads_leave_signals_alone() -> None:
    seen: list[Any] = []

    def look() -> None:
        with stoppable(), held():
            seen.append(signal.getsignal(TERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_within_another_and_after_another_handler_was_set() -> None:
    with stoppable():
        outer = signal.getsignal(TERM)
        with stoppable():
            assert signal.getsignal(TERM) is outer
            with pytest.raises(Stopped), held():
                with held():
                    signal.raise_signal(TERM)
                seen = "until the outermost ends"
        assert seen and signal.getsignal(TERM) is outer
        signal.signal(HUP, signal.SIG_IGN)
    assert signal.getsignal(TERM) is signal.SIG_DFL and signal.getsignal(HUP) is signal.SIG_IGN


def test_a_second_ctrl_c_does_not_wait() -> None:
    ends: list[str] = []
    with stoppable():
        with pytest.raises(KeyboardInterrupt), held():
            signal.raise_signal(INT)
            ends.append("the first waited")
            signal.raise_signal(INT)
            ends.append("and the second")
        assert ends == ["the first waited"]
        assert signal.getsignal(INT) is signal.default_int_handler


def test_a_forked_child_ends_at_once() -> None:
    with stoppable():
        child = os.fork()
        if child == 0:
            signal.raise_signal(TERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -TERM
