"""Runs on a real Ray: what they come to is what one process comes to, whatever dies on the way."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opdkit.base.config import to_yaml
from opdkit.base.files import read_lines
from opdkit.run.settings import make_run
from tests.common.tiny import save_tiny
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows
from tests.end_to_end.conftest import shop as shop
from tests.run.cluster.faults import FILE

pytestmark = pytest.mark.ray
LIMIT = 280  # seconds of one run: a hang is a failure with a message
CPUS = 6
# what is not the same each time: times, and who did what
NOISE = ("seconds/", "memory/", "tokens_per_second/", "mfu/", "cluster/", "sampler/", "pool/")
EVERYONE = "{kind: ray, address: ADDRESS, trainers: 2, samplers: 2, teachers: 1}"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # one of these tests' own
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of this module's own, with a small object store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray")  # a short path, as it is a socket's
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={port}", f"--num-cpus={CPUS}", "--include-dashboard=false"]
    command += ["--object-store-memory=100000000", f"--temp-dir={folder}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **quiet)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Done:
    """What a run has left."""

    status: int
    said: str
    folder: Path
    seconds: float

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")

    @property
    def metrics(self) -> list[dict[str, float]]:
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def last(self) -> dict[str, float]:
        return self.metrics[-1]

    def spans(self) -> set[tuple[str, str]]:
        lines = read_lines(self.folder / "timeline.jsonl")
        return {(span[0], span[1]) for line in lines for span in line["spans"]}


@dataclass
class Bench:
    """Where runs of one test are started."""

    shop: Shop
    folder: Path
    address: str

    def start(self, name: str, *settings: str, cluster: str | None = None, **more: Any) -> Any:
        """`opdkit train` of six steps, saved every second."""
        method = self.folder / "faults.py"
        method.write_text(FILE)
        values = self.shop.values(
            self.folder / name,
            method=f"{method}:tip",
            reward=self.shop.reward,
            dtype="float64",
            steps=6,
            prompts_per_step=6,
            sampling={"num_generations": 2, "max_completion_length": 6},
            checkpoint={"every": 2, "keep": 9},
            **more,
        )
        file = self.folder / f"{name}.yaml"
        file.write_text(to_yaml(make_run(values)))
        on = [] if cluster is None else [f"cluster={cluster.replace('ADDRESS', self.address)}"]
        command = [sys.executable, "-m", "opdkit", "train", str(file), *on, *settings]
        said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **said)

    def end(self, name: str, running: Any) -> Done:
        began = time.monotonic()
        try:
            said, _ = running.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            said, _ = running.communicate()
            pytest.fail(f"{name} did not end within {LIMIT} s:\n{said[-2000:]}")
        seconds = time.monotonic() - began
        print(f"{name}: {seconds:.1f} s")
        return Done(running.returncode, said, self.folder / name, seconds)

    def run(self, name: str, *settings: str, cluster: str | None = None, **more: Any) -> Done:
        done = self.end(name, self.start(name, *settings, cluster=cluster, **more))
        assert done.status == 0, done.said[-3000:]
        return done

    def until(self, name: str, steps: int, running: Any) -> None:
        """Waits until a run has done so many steps."""
        path, end = self.folder / name / "metrics.jsonl", time.monotonic() + LIMIT
        while not path.exists() or path.read_text().count("\n") < steps:
            assert running.poll() is None, running.communicate()[0][-3000:]
            assert time.monotonic() < end, f"{name} has not done {steps} steps within {LIMIT} s"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def bench(shop: Shop, address: str, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(shop, tmp_path_factory.mktemp("bench"), address)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> Done:
    """Two trainers, two samplers, a teacher, one step ahead."""
    return bench.run("undisturbed", "ahead=1", cluster=EVERYONE)


def apart(a: Done, b: Done) -> tuple[float, float]:
    """The largest difference of two runs' weights, and of their metrics, to their size."""
    assert a.weights.keys() == b.weights.keys()
    size = max(float(w.norm()) for w in a.weights.values())
    weights = max(float((w - b.weights[n]).norm()) for n, w in a.weights.items()) / size
    metrics = 0.0
    assert len(a.metrics) == len(b.metrics) == 6
    for one, other in zip(a.metrics, b.metrics):
        names = [{n for n in m if not n.startswith(NOISE)} for m in (one, other)]
        assert names[0] == names[1]
        for name in names[0]:
            if not math.isnan(one[name]):
                metrics = max(metrics, abs(one[name] - other[name]) / max(1.0, abs(one[name])))
    return weights, metrics


def assert_same(a: Done, b: Done) -> None:
    """To the bit, weights and metrics."""
    assert all(torch.equal(w, b.weights[n]) for n, w in a.weights.items())
    assert apart(a, b)[1] == 0.0


def test_at_lag_0_it_is_one_process(bench: Bench) -> None:
    one = bench.run("one")
    several = bench.run("several", cluster="{kind: ray, address: ADDRESS, samplers: 2}")
    weights, metrics = apart(one, several)
    assert weights < 1e-12 and metrics < 1e-12
    assert "lag/steps" not in several.last
    assert "step 6/6" in several.said and f"model   {several.folder}/model" in several.said


def test_one_step_ahead_two_ranks_are_one(bench: Bench, undisturbed: Done) -> None:
    one = bench.run("one-ahead", "ahead=1")
    weights, metrics = apart(one, undisturbed)
    assert weights < 1e-12 and metrics < 1e-12
    assert [m.get("lag/steps", 0.0) for m in undisturbed.metrics] == [0.0] + [1.0] * 5
    wrote = sum(v for n, v in undisturbed.last.items() if n.startswith("sampler/rollouts/"))
    assert wrote == 6 * 6 * 2
    parts = {"trainer", "sampler", "sampler:0", "sampler:1", "teacher:teacher"}
    assert parts <= {part for part, _ in undisturbed.spans()}


def test_adapters_are_sent_alone_and_two_teachers_share_a_process(bench: Bench) -> None:
    """Numbers of teachers by route, which take turns in one process; LoRA over two ranks."""
    teacher = {"math": bench.shop.teacher, "code": save_tiny(bench.folder / "code", seed=7)}
    rows = [{**row, "teacher": ("math", "code")[i % 2]} for i, row in enumerate(gsm8k_rows(6))]
    more = {"data": write_rows(bench.folder / "routes.jsonl", rows), "lora": {"r": 4}}
    one = bench.run("adapters-one", "method=opd", teacher=teacher, **more)
    cluster = EVERYONE.replace("teachers: 1", "teachers: 1, spare_teachers: false")
    several = bench.run("adapters", "method=opd", cluster=cluster, teacher=teacher, **more)
    weights, metrics = apart(one, several)
    assert weights < 1e-12 and metrics < 1e-12
    assert several.last["pool/tokens/teacher.math"] > 0 < several.last["pool/tokens/teacher.code"]
    assert several.last["pool/swaps"] >= 6  # one at a time, by what is asked for


def test_a_sampler_and_a_teacher_that_die_change_nothing(bench: Bench, undisturbed: Done) -> None:
    """In the middle of what they do; the sampler comes back, the teacher's spare takes over."""
    for fault in ("die-sampler-0-3", "die-teacher-0-2"):
        (bench.folder / fault).touch()
    killed = bench.run("killed", "ahead=1", cluster=EVERYONE)
    assert not list(bench.folder.glob("die-*"))
    assert_same(undisturbed, killed)
    wrote = sum(v for n, v in killed.last.items() if n.startswith("sampler/rollouts/"))
    assert wrote == 6 * 6 * 2  # none was lost, none counted twice
    assert killed.last["sampler/lost"] == 1 and killed.last["pool/replaced"] == 1


def test_a_trainer_that_dies_goes_on_from_its_checkpoint(bench: Bench, undisturbed: Done) -> None:
    (bench.folder / "die-trainer-1-0-4").touch()
    killed = bench.run("trainer", "ahead=1", cluster=EVERYONE)
    assert_same(undisturbed, killed)
    assert killed.last["cluster/trainer_restarts"] == 1
    [line] = [line for line in killed.said.splitlines() if "started again" in line]
    assert "trainer 1 died" in line and "(1 of 3)" in line


def test_a_slow_sampler_holds_nobody_up(bench: Bench) -> None:
    """While it learns, rollouts are written; what the slow one has not done the other does too."""
    for name, seconds in (("slow-sampler-1", 4.0), ("slow-trainer-0-0", 2.0)):
        (bench.folder / name).write_text(str(seconds))
    slow = bench.run("slow", "ahead=1", cluster="{kind: ray, address: ADDRESS, samplers: 2}")
    for path in bench.folder.glob("slow-*"):
        path.unlink()
    after = slow.metrics[1:]
    waited = sum(m["seconds/wait"] for m in after) / sum(m["seconds/step"] for m in after)
    print(f"the trainer waited {waited:.1%} of the time after the first step")
    assert waited < 0.1
    assert max(m["lag/steps"] for m in after) == 1.0
    assert slow.last["sampler/rollouts/0"] > slow.last.get("sampler/rollouts/1", 0.0)


HOLD = """
import sys, ray
ray.init(address=sys.argv[1], namespace="other", log_to_driver=False, logging_level="ERROR")
held = ray.remote(object).options(num_cpus=float(sys.argv[2])).remote()
ray.get(held.__ray_ready__.remote())
print("held", flush=True)
sys.stdin.read()
"""


def test_a_late_sampler_joins(bench: Bench) -> None:
    """It waits for room, which another program gives up in the middle of the run."""
    (bench.folder / "slow-trainer-0-0").write_text("2.0")
    free = 1.5  # the trainer and one sampler
    command = [sys.executable, "-c", HOLD, bench.address, str(CPUS - free)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)
    try:
        assert other.stdout.readline() == "held\n"
        cluster = "{kind: ray, address: ADDRESS, samplers: 1, late_samplers: 1, parts: 6}"
        running = bench.start("late", "ahead=1", "steps=40", cluster=cluster)
        bench.until("late", 2, running)
        other.communicate(timeout=30)
        path, end = bench.folder / "late" / "metrics.jsonl", time.monotonic() + 120
        while '"sampler/rollouts/1"' not in path.read_text():
            assert running.poll() is None and time.monotonic() < end, "it has not joined"
            time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        done = bench.end("late", running)
    finally:
        if other.poll() is None:
            os.killpg(other.pid, signal.SIGKILL)
        (bench.folder / "slow-trainer-0-0").unlink()
    first = next(m for m in done.metrics if "sampler/rollouts/1" in m)
    assert done.metrics[0]["sampler/there"] == 1 and first["sampler/there"] == 2
    # a signal saves the run
    assert done.status == 143 and "continue with --resume" in done.said
    saved = (bench.folder / "late").glob("checkpoint-*")
    assert max(int(p.name.rpartition("-")[2]) for p in saved) >= len(done.metrics) - 1


def test_what_the_user_can_mend_is_not_tried_again(bench: Bench) -> None:
    rows = bench.folder / "routes.jsonl"
    rows.write_text(json.dumps({"question": "1 + 1?", "answer": "2", "teacher": "nobody"}) + "\n")
    running = bench.start("refused", f"data={rows}", f"teacher={{math: {bench.shop.teacher}}}",
                          cluster="{kind: ray, address: ADDRESS}")  # fmt: skip
    done = bench.end("refused", running)
    assert done.status == 2 and done.said.count("opdkit: error") == 1
    assert "names the teacher 'nobody'" in done.said and "started again" not in done.said
    assert not done.folder.exists()


def test_what_has_no_room_is_said_before_anything_starts(bench: Bench) -> None:
    cluster = "{kind: ray, address: ADDRESS, trainers: 4, samplers: 6, patience: 1}"
    done = bench.end("large", bench.start("large", cluster=cluster))
    assert done.status == 2 and "7 CPU, 0 GPU" in done.said and "has 6 CPU" in done.said
    assert "No room is left for" in done.said and "sampler-5" in done.said
    assert not done.folder.exists()
