"""Several models behind one `opdkit serve-teacher`: each says what it says alone, whichever worker
holds it and whatever happened to that before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.cli.serve_teacher import named
from opdkit.models.body import head_of
from opdkit.models.engines.endpoint import Endpoint, Refused
from opdkit.models.load import load_model
from opdkit.models.offload import Offloaded
from opdkit.objective.divergences import ReverseKL
from opdkit.objective.facts import EntropyFact, Fact, GapFact, LogpFact, TopFact
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel, pooled
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.front import About
from opdkit.teachers.http import TeacherServer
from opdkit.teachers.kinds import teacher_of
from opdkit.teachers.pool import Worker
from opdkit.teachers.pooled import Pooled, ProcessWorker, Serving, Shelf, open_pool
from opdkit.teachers.serve import worker_devices
from opdkit.train.gather import gather
from opdkit.types import Rollout
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.train.rows import rollouts

NUMBERS: tuple[Fact, ...] = (LogpFact("teacher"), EntropyFact("teacher"), TopFact("teacher", 3))
WHOLE: tuple[Fact, ...] = (*NUMBERS, GapFact(ReverseKL(), "student", "teacher"))
ONE_LOADS = threading.Lock()  # transformers loads no two models at once in one process
KINDS = {"math": "llama", "code": "qwen3", "chat": "gemma2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: str(save_tiny(folder / name, kind=kind, seed=i))
        for i, (name, kind) in enumerate(KINDS.items())
    }


class InThread(Worker):
    """A worker without a process: the models of one shelf."""

    def __init__(self, serving: Serving, device: str, known: dict[str, About]):
        self.shelf = Shelf(serving, device)

    def load(self, name: str) -> None:
        with ONE_LOADS:
            self.shelf.load(name)

    def call(self, name: str, request: Any) -> Any:
        assert self.shelf.service is not None and self.shelf.service.about.name == name
        return self.shelf.answer(*request)


@contextmanager
def served(serving: Serving, workers: int) -> Iterator[TeacherServer]:
    pool, services = open_pool(serving, ["cpu"] * workers, patience=30.0)
    server = TeacherServer(("127.0.0.1", 0), services, pool=pool)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        pool.close()
        thread.join(10)


def url(server: TeacherServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def opened(facts: tuple[Fact, ...], said: Any) -> Any:
    method: Any = SimpleNamespace(needs=Needs(frozenset(facts)), name="mine", actions=None)
    return teacher_of(said).open(TeacherContext(method, tiny_tokenizer()))


def step() -> list[Rollout]:
    """Rollouts of all three routes."""
    return [replace(r, row={"teacher": name}) for r, name in zip(rollouts() * 3, [*KINDS] * 9)]


def gathered(
    facts: tuple[Fact, ...], teacher: Any, rows: list[Rollout]
) -> Mapping[Fact, torch.Tensor]:
    student = tiny_model("qwen3", seed=9)
    scorers = {"student": LocalModel(student, head_of(student)), "teacher": teacher}
    batch = gather(rows, Needs(frozenset(facts)), scorers)
    return {fact: batch.read(fact) for fact in facts}


def local(models: Mapping[str, str]) -> Any:
    return opened(NUMBERS, dict(models))


def routed(server: TeacherServer) -> dict[str, str]:
    return {name: f"{url(server)}#{name}" for name in KINDS}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("keep", [0, 1 << 30])
def test_three_models_of_few_workers_say_what_they_say_alone(
    workers: int, keep: int, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole vocabularies to the bit. Three models were loaded at the start and three are asked."""
    monkeypatch.setattr(pooled, "ProcessWorker", InThread)
    rows = step()
    with served(Serving(models, keep=keep), workers) as server:
        for facts in (NUMBERS, WHOLE):
            found = gathered(facts, opened(facts, routed(server)), rows)
            expected = gathered(facts, opened(facts, dict(models)), rows)
            for fact in facts:
                assert torch.equal(found[fact], expected[fact]), fact
        told = Endpoint([url(server)]).get("/pool")
    asked = {n: v for n, v in told["counts"].items() if n.startswith("pool/tokens/")}
    assert set(asked) == {f"pool/tokens/{name}" for name in KINDS} and min(asked.values()) > 0
    assert {part for part, *_ in told["spans"]} == {f"teacher:{name}" for name in KINDS}
    assert told["counts"]["pool/swaps"] >= 3


def test_kept_models_are_read_from_the_disk_once(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two of the three: the one that was used longest ago goes."""
    sizes = {}
    loads = []

    def load(path: str, *rest: Any) -> Any:
        model: Any = load_model(path, *rest)
        loads.append(Path(path).name)
        sizes[Path(path).name] = sum(p.numel() * p.element_size() for p in model.parameters())
        return model

    monkeypatch.setattr(pooled, "load_model", load)
    everything = Shelf(Serving(models, keep=1 << 30), "cpu")
    for name in [*KINDS] * 2:
        assert everything.load(name).name == name
    assert loads == [*KINDS]
    loads.clear()
    nothing = Shelf(Serving(models), "cpu")
    for name in [*KINDS] * 2:
        nothing.load(name)
    assert loads == [*KINDS] * 2 and not nothing.kept
    loads.clear()
    two = Shelf(Serving(models, keep=sum(sizes.values()) - 1), "cpu")
    for name in ("math", "code", "math", "chat", "math", "code"):
        two.load(name)
    assert loads == ["math", "code", "chat", "code"]


def test_a_model_that_waits_leaves_nothing_on_the_device(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is told by a fetch that copies: what is held are copies, what waits are not, the
    head included.
    """

    def fetching(model: Any, head: Any, device: str) -> Offloaded:
        return Offloaded(model, head, "cpu", fetch=torch.clone)

    monkeypatch.setattr(pooled, "Offloaded", fetching)
    monkeypatch.setattr(pooled, "load_model", lambda path, dtype, _, t: load_model(path, dtype))
    shelf = Shelf(Serving(models, keep=1 << 30), "meta")  # any that is not the CPU
    alone = Shelf(Serving(models), "cpu")
    for name in ("math", "code", "math"):
        shelf.load(name)
        alone.load(name)
        assert shelf.answer("head") == alone.answer("head")
        assert shelf.answer("entries", [[5, 6, 7]], 3) == alone.answer("entries", [[5, 6, 7]], 3)
        for other, kept in shelf.kept.items():
            assert kept.away is not None and kept.away.depth == (other == name)
            assert (kept.service.local.head.weight is None) == (other != name)


def test_each_model_is_asked_by_its_name(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled, "ProcessWorker", InThread)
    with served(Serving(models), 1) as server:
        client = Endpoint([url(server)], retries=0)
        cards = client.get("/v1/models")["data"]
        assert [card["id"] for card in cards] == [*KINDS]
        assert len({card["opdkit"]["fingerprint"] for card in cards}) == 3
        for path, words in (
            ("/head", "this server has math, code, chat: say which is asked"),
            ("/head?model=maths", "`maths` does not exist: this server has math, code, chat"),
            ("/pool?since=now", "since='now' is no number"),
        ):
            with pytest.raises(Refused, match=words):
                client.get(path)
        ask = {"prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 0}
        said = {n: client.post("/v1/completions", {"model": n, **ask})["choices"] for n in KINDS}
        assert said["math"] != said["code"] != said["chat"]
        with pytest.raises(Refused, match="say which is asked"):
            client.post("/v1/completions", ask)
        with pytest.raises(UserError, match=r"serves math, code, chat: say which is the teacher"):
            opened(NUMBERS, url(server))
        with pytest.raises(UserError, match=r"does not serve 'maths' but math, code, chat"):
            opened(NUMBERS, f"{url(server)}#maths")
        # it waits for its turn as long as the server has it wait
        assert opened(NUMBERS, f"{url(server)}#math").endpoint.timeout == 600.0


def test_what_is_asked_again_while_it_is_under_way_is_scored_once() -> None:
    """A client that gave up and asks again waits for the first answer; what nobody waits for any
    more is not begun.
    """
    hold, seen = threading.Event(), []

    class Slow(Worker):
        def load(self, name: str) -> None:
            pass

        def call(self, name: str, request: Any) -> Any:
            seen.append(request)
            assert hold.wait(10)
            return [request]

    pool = pooled.Pool([Slow()])
    about = About("T", "f", "t", 320, 8, 320, 320, 64)
    teacher = Pooled(pool, about, None, pooled.Room(1))
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(teacher.entries, [[5, 6]], 2) for _ in range(2)]
        while not teacher.under_way or [n for _, n in teacher.under_way.values()] != [2]:
            threading.Event().wait(0.01)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pooled.front, "LONGEST", 0.01)
            with pytest.raises(pooled.BadRequest, match="had no turn"):
                teacher.entries([[7, 8]], 2)
        hold.set()
        first, second = (answer.result(10) for answer in answers)
    pool.close()
    assert first == second == [("entries", [[5, 6]], 2)] and seen == first
    assert not teacher.under_way


def test_a_model_whose_files_changed_is_refused(models: dict[str, str]) -> None:
    made = ProcessWorker.__new__(ProcessWorker)
    made.known = {}
    about = Shelf(Serving(models), "cpu").load("math")
    said = iter([about, about, replace(about, fingerprint="other")])
    made._ask = lambda *what: next(said)  # type: ignore[method-assign]
    made.load("math")
    made.load("math")
    with pytest.raises(UserError, match="files of math hold other weights than when this server"):
        made.load("math")


@pytest.mark.slow
def test_processes_that_are_killed_are_replaced_and_nothing_is_lost(
    models: dict[str, str],
) -> None:
    rows = step()
    with served(Serving(models), 2) as server:
        teacher = opened(NUMBERS, routed(server))
        expected = gathered(NUMBERS, local(models), rows)
        for _ in range(2):
            assert server.pool is not None
            worker: Any = server.pool.workers[0]
            os.kill(worker.process.pid, signal.SIGKILL)
            found = gathered(NUMBERS, teacher, rows)
            for fact in NUMBERS:
                torch.testing.assert_close(found[fact], expected[fact], rtol=0, atol=1e-5)
        processes = [w.process for w in server.pool.workers]  # type: ignore[attr-defined]
    assert not any(process.is_alive() for process in processes)


def ended(group: int) -> bool:
    """Whether all processes of a group are gone, soon."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_the_command_serves_by_name_and_leaves_no_process(models: dict[str, str]) -> None:
    """Ctrl-C reaches the workers too, which leave the end to the server."""
    given = [f"{name}={path}" for name, path in models.items()]
    command = [sys.executable, "-m", "opdkit", "serve-teacher", *given, "--workers", "2"]
    command += ["--port", "0", "--device", "cpu", "--keep-on-cpu", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as of:
        assert of.stdout is not None
        first, second = of.stdout.readline(), of.stdout.readline()
        assert "serving math, code, chat (float32) from 2 worker(s) on cpu, cpu at" in first
        where = first.split()[-1]
        assert f"teacher.math={where}#math" in second
        found = gathered(NUMBERS, opened(NUMBERS, {n: f"{where}#{n}" for n in KINDS}), step())
        os.killpg(of.pid, signal.SIGINT)
        assert of.stdout.read().endswith("stopped\n") and of.wait(30) == 0
    expected = gathered(NUMBERS, local(models), step())
    for fact in NUMBERS:
        torch.testing.assert_close(found[fact], expected[fact], rtol=0, atol=1e-5)
    assert ended(of.pid)


def test_names_and_devices_as_they_are_given(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named(["Qwen/Qwen3-8B"]) == {} and named([str(odd)]) == {}
    assert named(["math=A", "code=B=C"]) == {"math": "A", "code": "B=C"}
    assert named(["math=A"]) == {"math": "A"}
    for wrong, words in (
        (["A", "code=B"], "'A' has no name"),
        (["a=A", "a=B"], "two models are called 'a'"),
        (["=A", "b=B"], "'A' has no name"),
    ):
        with pytest.raises(UserError, match=words):
            named(wrong)
    assert worker_devices("auto", ["cpu"], 3) == ["cpu"] * 3
    with pytest.raises(UserError, match="--workers 0 must be at least 1"):
        worker_devices("auto", [], 0)
    with pytest.raises(UserError, match="--device and --devices both say"):
        worker_devices("cpu", ["cpu"], None)
