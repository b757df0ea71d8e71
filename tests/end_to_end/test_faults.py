"""A teacher's server fails in the middle of a run: what can succeed is tried again, else the run
stops with the rollout and the reason, and resumed it is the run that nothing happened to, bit for
bit (PITFALLS R6).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opdkit import UserError
from opdkit.models.engines import endpoint
from opdkit.models.load import load_model, load_tokenizer
from opdkit.run.launch import execute
from opdkit.teachers.http import TeacherServer
from opdkit.teachers.serve import make_server
from opdkit.teachers.service import Service
from opdkit.train import checkpoint as checkpoints
from tests.common.fake_server import FakeServer, Fault
from tests.end_to_end.conftest import Shop
from tests.end_to_end.conftest import train as command
from tests.end_to_end.crash import assert_same
from tests.end_to_end.test_errors import refused

STEPS, PER_STEP = 4, 4  # rollouts are scored one by one
PROBES = 2  # requests at the start
SENT = PER_STEP + 1  # requests of a step: the first of all is made again at its end
MIDDLE = PROBES + 2 * SENT + 2  # the second of the third step


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)


@pytest.fixture(scope="module")
def parts(shop: Shop) -> tuple[Any, Any]:
    return load_model(shop.teacher), load_tokenizer(shop.teacher)


def train(
    shop: Shop,
    output: Path,
    *urls: str,
    resume: bool = False,
    method: Any = "opd",
    timeout: float = 10.0,
) -> None:
    teacher = {
        "kind": "server",
        "urls": list(urls),
        "timeout": timeout,
        "retries": 1,
        "concurrency": 1,
    }
    execute(
        shop.run(output, teacher=teacher, method=method, steps=STEPS, checkpoint={"every": 10}),
        resume=resume,
    )


@pytest.fixture(scope="module")
def whole(shop: Shop, parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with FakeServer(*parts) as fake:
        train(shop, folder, fake.url)
        assert fake.scored == PROBES + STEPS * SENT
    return folder


@pytest.mark.parametrize("kind", ["500", "503", "429", "close", "broken", "hang"])
def test_what_passes_is_tried_again_and_leaves_no_trace(
    kind: str, shop: Shop, parts: tuple[Any, Any], tmp_path: Path, whole: Path
) -> None:
    with FakeServer(*parts, faults=[Fault(kind, at=MIDDLE)]) as fake:
        train(shop, tmp_path / "run", fake.url, timeout=0.3 if kind == "hang" else 10.0)
        assert fake.scored == PROBES + STEPS * SENT + 1
    assert_same(tmp_path / "run", whole)


LASTING = {
    "500": "500 out of memory",
    "hang": "no answer within 0.3 s",
    "close": "RemoteProtocolError",
    "die": "ConnectError",
    "nan": "are no log-probs",
    "shifted": "do not hold its own id",
    "short": "so none can be assigned to its token",
    "other": "the answer is the model 'somebody else''s",
}


@pytest.mark.parametrize("kind", LASTING)
def test_what_lasts_stops_the_run_with_the_rollout_and_resumed_nothing_is_lost(
    kind: str, shop: Shop, parts: tuple[Any, Any], tmp_path: Path, whole: Path
) -> None:
    fast = 0.3 if kind == "hang" else 10.0
    with (
        FakeServer(*parts, faults=[Fault(kind, at=MIDDLE, times=0)]) as fake,
        pytest.raises(UserError, match=r"^rollout 2/\S+ at teacher( \(http\S+\))?: ") as caught,
    ):
        train(shop, tmp_path / "run", fake.url, timeout=fast)
    assert LASTING[kind] in str(caught.value)
    newest = checkpoints.newest(tmp_path / "run")
    assert newest is not None and newest.name == "checkpoint-2"
    with FakeServer(*parts) as healthy:
        train(shop, tmp_path / "run", healthy.url, resume=True)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("kind", ["die", "500", "hang"])
def test_another_server_takes_over(
    kind: str, shop: Shop, parts: tuple[Any, Any], tmp_path: Path, whole: Path
) -> None:
    with FakeServer(*parts, faults=[Fault(kind, at=6, times=0)]) as ill, FakeServer(*parts) as well:
        train(shop, tmp_path / "run", ill.url, well.url, timeout=0.3 if kind == "hang" else 10.0)
        # asked for scores it fails once; whether it is back is tried at the end of each step
        assert 6 <= ill.scored <= 6 + STEPS and well.scored > STEPS * PER_STEP // 2
    assert_same(tmp_path / "run", whole)


def test_another_model_at_the_restart_is_refused_and_nothing_is_overwritten(
    shop: Shop,
    parts: tuple[Any, Any],
    tmp_path: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(fake: FakeServer, *arguments: str) -> int:
        models = (
            f"--student={shop.student}",
            f"--data={shop.data}",
            f"--output={tmp_path / 'run'}",
        )
        server = ("teacher.kind=server", f"teacher.urls=[{fake.url}]", "teacher.model=teacher")
        return command(*models, *server, f"steps={STEPS}", "checkpoint.every=10", *arguments)

    with FakeServer(*parts, faults=[Fault("nan", at=MIDDLE)]) as fake:
        refused(capsys, start(fake), "rollout 2/", "are no log-probs", "Nothing was learnt")
    with FakeServer(*parts, name="poet") as fake:
        refused(capsys, start(fake, "--resume"), "does not serve 'teacher' but poet")
    with FakeServer(*parts) as fake:
        assert start(fake, "--resume") == 0
    assert_same(tmp_path / "run", whole)


# ----------------------------------------------------------------------------- opdkit serve-teacher


@contextmanager
def serving(parts: tuple[Any, Any]) -> Iterator[TeacherServer]:
    server = make_server(*parts, "teacher", port=0)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True
    ).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url(server: TeacherServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.mark.parametrize("method", ["opd", {"name": "gkd", "beta": 0.5}, "eopd"])
def test_a_served_teacher_is_the_teacher_in_process_also_when_it_fails_on_the_way(
    method: Any, shop: Shop, parts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs, the whole vocabulary, and entropy with the teacher's top k.

    The server fails once, then for good in the third step.
    """
    execute(shop.run(tmp_path / "local", method=method, steps=STEPS, checkpoint={"every": 10}))
    asked, real, failing = 0, Service.score, {4, 6, 7}  # two are made at the start

    def score(service: Service, body: bytes) -> bytes:
        nonlocal asked
        asked += 1
        if asked in failing:
            raise RuntimeError("CUDA error")
        return real(service, body)

    monkeypatch.setattr(Service, "score", score)
    with serving(parts) as server:
        with pytest.raises(
            UserError, match=r"^rollouts 2/.* at teacher: .*500 RuntimeError: CUDA error"
        ):
            train(shop, tmp_path / "run", url(server), method=method)
        train(shop, tmp_path / "run", url(server), method=method, resume=True)
    assert_same(tmp_path / "run", tmp_path / "local")
