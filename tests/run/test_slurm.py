"""The batch job that `opdkit slurm` writes: what it asks for, what it refuses, and that a run in it
is saved when its time is up and goes on in the next turn.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opdkit import UserError
from opdkit.cli import main
from opdkit.run.settings import make_run
from opdkit.run.slurm import Job, script, seconds_of, write_script

ROOT = Path(__file__).parents[2]
VALUES = {"student": "Qwen/Qwen3-0.6B", "teacher": "Qwen/Qwen3-4B", "data": "d"}


def text(job: Job, **settings: object) -> str:
    return script(make_run({**VALUES, **settings}), job, Path("/runs/one"), Path("/runs/one-logs"))


def valid(written: str) -> bool:
    return not subprocess.run(
        ["bash", "-n"], input=written, text=True, capture_output=True
    ).returncode


def test_what_is_asked_of_slurm_and_started_on_each_node() -> None:
    job = Job(("R.yaml", "lora.r=8"), 2, 4, "1-12:00:00", "gpu", "lab", 300, more=("--mem=0",))
    written = text(job)
    assert valid(written)
    asked = re.findall(r"^#SBATCH --(\S+)", written, re.M)
    assert {
        "nodes=2",
        "ntasks-per-node=1",
        "gpus-per-node=4",
        "time=1-12:00:00",
        "partition=gpu",
        "account=lab",
        "signal=B:USR1@300",
        "requeue",
        "mem=0",
    } <= set(asked)
    assert "--nnodes 2 --nproc-per-node 4" in written
    assert "-m opdkit train R.yaml lora.r=8 output=/runs/one" in written
    # the processes have until the end to save the run, whatever torchrun usually leaves them
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=290" in written
    on_cpu = text(Job(("R.yaml",), 2, 1), device="cpu")
    assert valid(on_cpu) and "gpus-per-node" not in on_cpu


def test_settings_reach_the_command_as_they_are() -> None:
    """Quotes, braces, spaces and dollars."""
    given = ("my run.yaml", "data={source: 'a b', split: \"t\"}", "reward=regex:$x`y`")
    written = text(Job(given))
    command = re.search(r"-m opdkit train (.*) output=", written)
    assert valid(written) and command is not None
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command[1]}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert tuple(words[:-1]) == given


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:00:05", 7205),
        ("1-0", 86400),
        ("2-03:30", 185400),
        ("1-00:00:01", 86401),
    ],
)
def test_times_as_slurm_reads_them(given: str, seconds: int) -> None:
    assert seconds_of(given) == seconds
    Job((), time=given)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"nodes": 0}, "--nodes 0"),
        ({"gpus": -1}, "--gpus -1"),
        ({"time": "a day"}, "no time of SLURM's"),
        ({"time": "1"}, "--grace 120"),
        ({"grace": 5}, "Give 20 or more"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, "cannot be the name"),
        ({"more": ("mem=0",)}, "no option of sbatch"),
        ({"more": ("--mem=0\nrm x",)}, "no option of sbatch"),
    ],
)
def test_what_slurm_could_not_do_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        Job((), **settings)  # type: ignore[arg-type]


def test_what_the_run_would_refuse_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(json.dumps({**VALUES, "method": "grpo"}))
    assert main(["slurm", "r.yaml"]) == 2
    assert "the run has no reward" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    assert main(["slurm", "r.yaml", "method=opd", "output=runs/first", "--nodes", "2"]) == 0
    assert "sbatch first.sbatch" in capsys.readouterr().out
    written = (tmp_path / "first.sbatch").read_text()
    assert f"{tmp_path}/r.yaml method=opd output={tmp_path}/runs/first" in written
    assert (tmp_path / "runs/first-logs").is_dir()  # which SLURM does not make
    # its own script is written anew, another's is not
    assert main(["slurm", "r.yaml", "method=opd", "output=runs/first"]) == 0
    (tmp_path / "first.sbatch").write_text("#!/bin/bash\nmine\n")
    assert main(["slurm", "r.yaml", "method=opd", "output=runs/first"]) == 2
    assert "has not written it" in capsys.readouterr().err


def test_a_run_on_a_cluster_of_its_own_is_refused(tmp_path: Path) -> None:
    run = make_run({**VALUES, "cluster": "ray"})
    with pytest.raises(UserError, match="leave cluster out"):
        write_script(run, Job(("r.yaml",)), tmp_path / "a.sbatch")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_gone_on_with_where_that_is_said(tmp_path: Path) -> None:
    run = make_run({**VALUES, "output": str(tmp_path / "done")})
    (tmp_path / "done/checkpoint-3").mkdir(parents=True)
    (tmp_path / "done/run.yaml").write_text("")
    (tmp_path / "done/metrics.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(UserError, match="already holds a run"):
        write_script(run, Job(("r.yaml",)), tmp_path / "a.sbatch")
    path = write_script(run, Job(("r.yaml",), resume=True), tmp_path / "a.sbatch")
    assert "resume=(--resume)" in path.read_text().splitlines()


# ------------------------------------------------------------------------- the job, on two "nodes"

SRUN = """\
import os, subprocess, sys
args = sys.argv[1:]
command = args[next(i for i, a in enumerate(args) if not a.startswith("--")) :]
log = next(a for a in args if a.startswith("--output=")).removeprefix("--output=")
nodes = int(next(a for a in args if a.startswith("--nodes=")).removeprefix("--nodes="))
running = []
for node in range(nodes):
    name = log.replace("%j", os.environ["SLURM_JOB_ID"]).replace("%n", str(node))
    running.append(subprocess.Popen(command, stdout=open(name, "ab"), stderr=subprocess.STDOUT))
open(os.environ["FAKE"] + "/pids", "w").write(" ".join(str(p.pid) for p in running))
sys.exit(max(abs(p.wait()) for p in running))
"""
# as SLURM does it, to every process of the step
SCANCEL = """\
import os, signal, subprocess
above = {}
for line in subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True).splitlines():
    pid, parent = map(int, line.split())
    above.setdefault(parent, []).append(pid)
found = [int(p) for p in open(os.environ["FAKE"] + "/pids").read().split()]
for pid in found:
    found += above.get(pid, [])
for pid in found:
    os.kill(pid, signal.SIGTERM)
"""
SCONTROL = """\
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\n127.0.0.1")
else:
    open(os.environ["FAKE"] + "/requeued", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


def fakes(folder: Path) -> dict[str, str]:
    """What stands for SLURM on two nodes of this machine, and its environment."""
    folder.mkdir()
    for name, code in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
    return {**os.environ, **job, "PATH": path, "FAKE": str(folder), "PYTHONPATH": str(ROOT)}


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


@pytest.mark.ranks
def test_a_job_is_saved_when_its_time_is_up_and_goes_on_in_its_next_turn(tmp_path: Path) -> None:
    from tests.common.tiny import save_tiny
    from tests.end_to_end.conftest import gsm8k_rows, write_rows

    student, teacher = save_tiny(tmp_path / "student"), save_tiny(tmp_path / "teacher")
    values = {
        "student": student,
        "teacher": teacher,
        "data": write_rows(tmp_path / "rows.jsonl", gsm8k_rows(8)),
        "output": str(tmp_path / "runs/one"),
        "device": "cpu",
        "steps": 40,
        "prompts_per_step": 2,
        "sampling": {"max_completion_length": 6},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    job = Job((str(tmp_path / "r.yaml"),), nodes=2, gpus=1)
    path = write_script(make_run(values), job, tmp_path / "one.sbatch")
    environment, folder = fakes(tmp_path / "slurm"), tmp_path / "runs/one"
    first = subprocess.Popen(["bash", str(path)], env=environment)
    try:
        end = time.monotonic() + 240
        while len(steps(folder)) < 2 and time.monotonic() < end:
            assert first.poll() is None, logs(tmp_path)
            time.sleep(0.05)
        first.send_signal(signal.SIGUSR1)  # as SLURM does some seconds before the end
        assert first.wait(240) != 0, logs(tmp_path)
    finally:
        first.kill()
    done = steps(folder)
    assert 2 <= len(done) < 40, logs(tmp_path)
    assert (folder / f"checkpoint-{done[-1]}").is_dir(), "the step that was done is kept"
    assert (tmp_path / "slurm/requeued").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    again = {**environment, "SLURM_RESTART_COUNT": "1"}
    second = subprocess.run(["bash", str(path)], env=again, timeout=400)
    assert second.returncode == 0, logs(tmp_path)
    assert steps(folder) == list(range(1, 41)) and (folder / "model").is_dir()
    assert len((tmp_path / "slurm/requeued").read_text().splitlines()) == 1
    assert len(list((tmp_path / "runs/one-logs").iterdir())) == 2  # one for each node


def logs(folder: Path) -> str:
    return "\n".join(p.read_text()[-3000:] for p in folder.glob("runs/*-logs/*"))
