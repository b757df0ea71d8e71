"""One of several processes fails: the others end soon, one message says why, nothing is left
behind, and the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from opdkit.base.files import read_lines
from opdkit.base.launched import CLAIM
from opdkit.cli import main
from tests.end_to_end.conftest import Shop
from tests.end_to_end.faulty import MOMENTS

ROOT = Path(__file__).parents[2]
METHOD = f"{Path(__file__).with_name('faulty.py')}:opd"
SOON = 10.0  # seconds in which all have ended
MARK = "OPDKIT_TEST_RUN"  # in the environment of all that a run starts
NPROC = [sys.executable, "-m", "opdkit", "train", "--nproc=2"]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *("-m", "opdkit", "train"),
]


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    said: str
    seconds: float  # since the fault
    left: list[str]  # processes that outlived it


def settings(shop: Shop, out: Path, *more: str) -> list[str]:
    return [
        f"--student={shop.student}",
        f"--teacher={shop.teacher}",
        f"--data={shop.data}",
        f"--method={METHOD}",
        f"--reward={shop.reward}",
        f"--output={out}",
        f"evaluate.data={shop.data}",
        "evaluate.data.limit=2",
        *("evaluate.every=1", "steps=3", "prompts_per_step=2", "num_generations=2"),
        *("max_completion_length=6", "learning_rate=1e-3", "device=cpu", "checkpoint.every=1"),
        *more,
    ]


def run(launch: list[str], arguments: list[str], fault: dict[str, Any] | None = None) -> Ended:
    """A run in processes of this machine, all of them ended afterwards."""
    mark = f"{os.getpid()}-{time.time()}"
    env = {**os.environ, MARK: mark, "PYTHONWARNINGS": "ignore"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if fault is not None:
        env["FAULT"] = json.dumps(fault)
    process = subprocess.Popen(
        [*launch, *arguments], env=env, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=-3
    )
    try:
        said = process.communicate(timeout=600)[1]  # longer than any run that does not hang
    finally:
        ended = time.time()
        time.sleep(0.5)
        left = started(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.kill()
    noted = Path(fault["note"]) if fault else None
    assert noted is None or noted.exists(), f"nothing failed: {said[-3000:]}"
    at = ended if noted is None else float(noted.read_text())
    return Ended(process.returncode, said, ended - at, [str(pid) for pid in left])


def started(mark: str) -> list[int]:
    """The processes that have a mark in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def check(ended: Ended, how: str, said_by_launcher: bool) -> None:
    assert ended.code != 0
    assert ended.seconds < SOON, f"{ended.seconds:.1f} s: {ended.said[-2000:]}"
    assert ended.left == []
    if how == "error":
        assert ended.said.count("the disk fell asleep") == 1, ended.said[-3000:]
        assert ended.said.count("opdkit: error") == 1, ended.said[-3000:]
    elif said_by_launcher:
        assert ended.said.count("SIGKILL") == 1, ended.said[-3000:]
        assert ended.said.count("opdkit: error") == 1, ended.said[-3000:]
        assert "Traceback (most recent call last)" not in ended.said
    else:  # torchrun says it in its own words
        assert "opdkit: error" not in ended.said


def fails(
    shop: Shop, tmp_path: Path, at: str, rank: int, how: str, launch: list[str] = NPROC
) -> None:
    note = tmp_path / "moment"
    fault = {"at": at, "rank": rank, "how": how, "note": str(note)}
    ended = run(launch, settings(shop, tmp_path / "run"), fault)
    print(f"{at}, {how}, rank {rank}: {ended.seconds:.1f} s, status {ended.code}")
    check(ended, how, launch is NPROC)


def test_one_that_is_killed_while_it_learns(shop: Shop, tmp_path: Path) -> None:
    fails(shop, tmp_path, "learn", 1, "kill")


def test_one_whose_reward_fails(shop: Shop, tmp_path: Path) -> None:
    fails(shop, tmp_path, "reward", 1, "error")


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["kill", "error"])
@pytest.mark.parametrize("at", MOMENTS)
def test_one_fails_at_any_moment(shop: Shop, tmp_path: Path, at: str, how: str, rank: int) -> None:
    fails(shop, tmp_path, at, rank, how)


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["kill", "error"])
@pytest.mark.parametrize("at", ["load", "reward", "learn", "save"])
def test_one_fails_under_torchrun(shop: Shop, tmp_path: Path, at: str, how: str, rank: int) -> None:
    fails(shop, tmp_path, at, rank, how, TORCHRUN)


def test_the_launcher_says_what_nobody_has_said(tmp_path: Path, capfd: Any) -> None:
    """A process that ends with a status and no word, before it has met the others."""
    (tmp_path / "opdkit").mkdir()
    (tmp_path / "opdkit" / "__init__.py").write_text("")
    (tmp_path / "opdkit" / "__main__.py").write_text(
        "import os, time\nif os.environ['RANK'] == '1': os._exit(3)\ntime.sleep(60)\n"
    )
    launch = (
        f"from opdkit.run.processes import on_several as s; import os; os.chdir({str(tmp_path)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{launch}; raise SystemExit(s(2, ['train']))"],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.count("process 1 of the run ended with status 3 and said nothing") == 1


@pytest.mark.parametrize("ignored", [False, True])
def test_the_launcher_hands_on_what_is_not_ignored(tmp_path: Path, ignored: bool) -> None:
    """A closed terminal reaches the processes through the launcher alone; under `nohup` nothing
    does.
    """
    (tmp_path / "opdkit").mkdir()
    (tmp_path / "opdkit" / "__init__.py").write_text("")
    (tmp_path / "opdkit" / "__main__.py").write_text(
        "import os, pathlib, signal, time\n"
        "if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:\n"
        "    signal.signal(signal.SIGHUP, lambda *_: os._exit(129))\n"
        "pathlib.Path(os.environ['RANK']).touch()\n"
        "time.sleep(1)\n"
    )
    how = "SIG_IGN" if ignored else "SIG_DFL"
    program = (
        "import os, signal; from opdkit.run.processes import on_several as s\n"
        f"signal.signal(signal.SIGHUP, signal.{how}); os.chdir({str(tmp_path)!r})\n"
        "raise SystemExit(s(2, ['train']))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], env=env) as launcher:
        until = time.monotonic() + 30
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert time.monotonic() < until
            time.sleep(0.01)
        launcher.send_signal(signal.SIGHUP)
        assert launcher.wait(timeout=30) == (0 if ignored else 129)


def test_who_starts_the_processes(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line once, with the number that was said last; one of them starts none."""
    started = []
    monkeypatch.setattr("opdkit.run.processes.on_several", lambda *how: started.append(how) or 0)
    typed = ["train", "no.yaml", "--nproc", "3", "--nproc=2"]
    assert main(typed) == 0 and started == [(2, typed)]
    monkeypatch.setenv(CLAIM, "file")
    assert main(typed) == 2 and len(started) == 1
    assert "no.yaml" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(typed) == 2 and "one of 2 processes already" in capsys.readouterr().err


def learnt(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The weights of a run, and its metrics but for times and memory."""
    noise = ("seconds/", "memory/", "tokens_per_second/", "mfu/")
    lines = read_lines(folder / "metrics.jsonl")
    metrics = [{k: v for k, v in x.items() if not k.startswith(noise)} for x in lines]
    return load_file(folder / "model" / "model.safetensors"), metrics


@pytest.mark.ranks
def test_a_run_that_was_killed_goes_on(shop: Shop, tmp_path: Path) -> None:
    """On as many processes bit by bit, on more or fewer to rounding."""
    more = ("steps=5", "checkpoint.every=2")
    assert run(NPROC, settings(shop, tmp_path / "whole", *more)).code == 0
    (origin,) = read_lines(tmp_path / "whole" / "origin.jsonl")
    assert origin["processes"] == 2 and "--nproc=2" in origin["command"]
    fault = {"at": "optimiser step", "rank": 1, "how": "kill", "time": 5}
    fault["note"] = str(tmp_path / "moment")
    assert run(NPROC, settings(shop, tmp_path / "run2", *more), fault).code != 0
    for count in (1, 3):
        shutil.copytree(tmp_path / "run2", tmp_path / f"run{count}")
    weights, metrics = learnt(tmp_path / "whole")
    for count in (2, 1, 3):
        launch = [*NPROC[:-1], f"--nproc={count}"]
        again = run(launch, settings(shop, tmp_path / f"run{count}", *more, "--resume"))
        assert again.code == 0, again.said[-3000:]
        mine, found = learnt(tmp_path / f"run{count}")
        apart = max(float((mine[n] - w).abs().max()) for n, w in weights.items())
        print(f"resumed on {count}: weights {apart:.1e}")
        assert apart <= (0 if count == 2 else 1e-6)
        assert found == metrics if count == 2 else len(found) == len(metrics)
