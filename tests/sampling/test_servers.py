"""Several servers that write for one run, one of which is gone, or back: the run goes on with the
same rollouts, and nothing is used that was not probed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.sampling import servers as module
from opdkit.sampling.server import ServerSampler, ServerSettings
from opdkit.types import Rollout
from tests.common.fake_sampler import PAUSE, RESET, RESUME, RPC, UNLOAD, Vllm
from tests.common.fake_server import Fault
from tests.common.tiny import tiny_model
from tests.sampling.test_server import GREEDY, PROMPTS, TOKENIZER, connect


class Pair:
    """A student and two servers of other weights, each of which can end and come back."""

    def __init__(self, stack: ExitStack):
        self.stack, self.student = stack, tiny_model(seed=1)
        self.servers = [self.start() for _ in range(2)]

    def start(self, port: int = 0, **how: Any) -> Vllm:
        return self.stack.enter_context(Vllm(tiny_model(seed=9), TOKENIZER, port=port, **how))

    def end(self, number: int) -> None:
        self.servers[number].faults = [Fault("die", at=0, times=0)]
        with suppress(httpx2.HTTPError):
            httpx2.post(self.servers[number].url, json={})

    def back(self, number: int, **how: Any) -> Vllm:
        self.servers[number] = self.start(self.servers[number].port, **how)
        return self.servers[number]

    def move(self) -> None:
        with torch.no_grad():
            self.student.model.layers[0].mlp.up_proj.weight.add_(0.1)

    def expected(self, version: int = 0) -> list[Rollout]:
        """What a server of its own would write, with the student's weights as they are now."""
        with Vllm(tiny_model(), TOKENIZER) as own:
            sampler = connect(copy.deepcopy(self.student), [own])
            return sampler.sample(PROMPTS, GREEDY, policy_version=version)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack)


def written(server: Vllm) -> int:
    """Responses that it was asked for."""
    return sum("return_token_ids" in request for request in server.requests)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("opdkit:")]


def test_one_is_dead_from_the_start(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.end(0)
    sampler = connect(pair.student, pair.servers)
    assert sampler.sample(PROMPTS, GREEDY) == pair.expected()
    [line] = lines(capsys)
    assert f"{pair.servers[0].url} is left out" in line and "1 of 2 go on" in line
    assert sampler.metrics() == {"sampler/servers": 1.0}
    sampler.sync(pair.student, 1)  # it is knocked at again, and nobody has to hear of it again
    assert lines(capsys) == []


@pytest.mark.parametrize("at", [1, 2, 5])
def test_one_dies_as_weights_are_sent(
    pair: Pair, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is paused, as it loads them, and at the probe."""
    sampler = connect(pair.student, pair.servers)
    sampler.sync(pair.student, 0)
    first = pair.servers[0]
    first.faults = [Fault("die", at=first.scored + at)]
    pair.move()
    sampler.sync(pair.student, 1)
    assert sampler.sample(PROMPTS, GREEDY, policy_version=1) == pair.expected(1)
    assert len(lines(capsys)) == 1 and list(sampler.folder.iterdir()) == []


@pytest.mark.parametrize("fault", ["die", "close", "500", "broken"])
def test_one_fails_in_the_middle_of_drawing(
    pair: Pair, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = connect(pair.student, pair.servers)
    sampler.sync(pair.student, 0)
    first = pair.servers[0]
    first.faults = [Fault(fault, at=first.scored + 1)]
    expected = pair.expected()
    assert sampler.sample(PROMPTS, GREEDY) == expected
    # one that failed once and is still the same is used again
    left = ["die"] if fault == "die" else []
    assert len(lines(capsys)) == len(left)
    assert len(sampler.servers.in_use) == 2 - len(left)
    assert sampler.sample(PROMPTS, GREEDY) == expected


def test_what_one_wrote_after_it_was_started_again_is_written_anew(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both fail once, so that both are asked again; the first has other weights by then."""
    settings = ServerSettings(tuple(s.url for s in pair.servers), retries=3, concurrency=1)
    sampler = ServerSampler(pair.student, TOKENIZER, settings)
    sampler.servers.endpoint.sleep = lambda seconds: None
    sampler.sync(pair.student, 0)
    expected = pair.expected()
    for server in pair.servers:
        server.faults = [Fault("close", at=server.scored + 1)]
    pair.servers[0].model = tiny_model(seed=9)
    assert sampler.sample(PROMPTS, GREEDY) == expected
    assert written(pair.servers[0]) > 1  # answers that were thrown away
    [line] = lines(capsys)
    assert "it was started again, and lost them" in line and "--resume" not in line


def test_one_that_was_not_heard_of_is_probed_first(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was started again while nobody asked it, so that no request failed."""
    sampler = connect(pair.student, pair.servers)
    sampler.sync(pair.student, 0)
    pair.servers[0].model = tiny_model(seed=9)
    monkeypatch.setattr(module, "QUIET", -1.0)
    assert sampler.sample(PROMPTS, GREEDY) == pair.expected()
    assert written(pair.servers[0]) == 0


def test_one_that_never_answers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs its time-out once; later it is not waited for long."""
    urls = tuple(server.url for server in pair.servers)
    monkeypatch.setattr(module, "KNOCK", 0.2)
    settings = ServerSettings(urls, retries=0, timeout=1.5)
    sampler = ServerSampler(pair.student, TOKENIZER, settings)
    pair.servers[0].faults = [Fault("hang", at=0, times=0)]
    sampler.sync(pair.student, 0)
    assert "no answer within 1.5 s" in sampler.servers.all[0].out
    monkeypatch.setattr(pair.servers[0], "answer", lambda *_: pair.servers[0].released.wait(10))
    sampler.sync(pair.student, 1)
    assert [server.door.timeout for server in sampler.servers.all] == [0.2, 0.2]
    assert sampler.sample(PROMPTS, GREEDY) == pair.expected() and len(sampler.servers.in_use) == 1


def test_one_comes_back(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """It is sent the weights and probed before it is used; one that does not have them then stays
    out, as does one that was started otherwise.
    """
    sampler = connect(pair.student, pair.servers)
    sampler.sync(pair.student, 0)
    pair.end(0)
    sampler.sample(PROMPTS, GREEDY)
    back = pair.back(0, deaf=True)
    sampler.sample(PROMPTS, GREEDY)
    assert back.requests == [] and len(lines(capsys)) == 1  # nothing before weights are sent
    for version, wrong in enumerate(["not the student's", "Not Found", "does not serve"], start=1):
        pair.move()
        sampler.sync(pair.student, version)
        assert sampler.sample(PROMPTS, GREEDY, policy_version=version) == pair.expected(version)
        [line] = lines(capsys)
        assert wrong in line and "is left out" in line and written(back) == 0
        back.deaf, back.unknown = False, (RPC,)
        back.name = "student" if version == 1 else "another"
    back.name, back.unknown = "student", ()
    sampler.sync(pair.student, 4)
    [line] = lines(capsys)
    assert "is back" in line and "2 of 2" in line
    asked = len(back.requests)
    assert sampler.sample(PROMPTS, GREEDY, policy_version=4) == pair.expected(4)
    assert len(back.requests) > asked and sampler.metrics() == {"sampler/servers": 2.0}


def test_a_request_that_is_wrong_is_an_error_at_once(pair: Pair) -> None:
    sampler = connect(pair.student, pair.servers)
    pair.servers[1].unknown = (RPC,)
    with pytest.raises(UserError, match=r"(?s)404.*VLLM_SERVER_DEV_MODE=1 vllm serve MODEL"):
        sampler.sync(pair.student, 0)
    assert list(sampler.folder.iterdir()) == []


def test_all_are_dead(pair: Pair) -> None:
    sampler = connect(pair.student, pair.servers)
    for number in range(2):
        pair.end(number)
    with pytest.raises(UserError, match=r"(?s)no sampling server took.*127.*127.*vllm serve"):
        sampler.sync(pair.student, 0)
    with pytest.raises(UserError, match=r"does not answer GET /v1/models"):
        connect(pair.student, pair.servers)
    assert list(sampler.folder.iterdir()) == []


def test_all_die_after_the_weights_have_moved(pair: Pair) -> None:
    """The step is done, so the error waits for the next rollouts: until then it can be saved."""
    sampler = connect(pair.student, pair.servers)
    sampler.sync(pair.student, 0)
    for number in range(2):
        pair.end(number)
    pair.move()
    sampler.sync(pair.student, 1)
    moved = pair.expected(1)
    pair.back(1)
    pair.move()  # what is sent now is what was to be sent
    assert sampler.sample(PROMPTS, GREEDY, policy_version=1) == moved
    pair.end(1)
    sampler.sync(pair.student, 2)
    for _ in range(2):
        with pytest.raises(UserError, match="no sampling server"):
            sampler.sample(PROMPTS, GREEDY, policy_version=2)
    assert list(sampler.folder.iterdir()) == []


def test_all_die_in_the_middle_of_drawing(pair: Pair) -> None:
    sampler = connect(pair.student, pair.servers)
    sampler.sync(pair.student, 0)
    for server in pair.servers:
        server.faults = [Fault("die", at=server.scored + 1)]
    words = rf"rollout .*{pair.servers[0].url}.*{pair.servers[1].url}.*Nothing was learnt"
    with pytest.raises(UserError, match=words):
        sampler.sample(PROMPTS, GREEDY)


def test_what_is_staged_is_sent_as_it_was(pair: Pair) -> None:
    """From another thread, when the student has moved on."""
    sampler, found = connect(pair.student, pair.servers), list[Any]()
    expected = pair.expected()
    send = sampler.staged(pair.student, 0)
    pair.move()

    def work() -> None:
        send()
        found.extend(sampler.sample(PROMPTS, GREEDY, policy_version=0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert found == expected and found != pair.expected()


def test_phases_of_a_push(pair: Pair) -> None:
    """Paused before the weights change, and let go when what older ones computed is forgotten."""
    connect(pair.student, pair.servers).sync(pair.student, 0)
    for server in pair.servers:
        assert [path for path, _ in server.calls] == [PAUSE, RPC, RESET, RESUME]


def test_adapters_of_one_that_was_started_again(pair: Pair, tmp_path: Path) -> None:
    """It knows none of the former ones, of which it is told to forget the last."""
    from opdkit.train.settings import Lora
    from opdkit.train.student import with_adapters

    for server in pair.servers:
        server.model = copy.deepcopy(pair.student)
    model = with_adapters(copy.deepcopy(pair.student), Lora(r=2)).eval()
    sampler = connect(model, pair.servers, enable_lora=True, shared_folder=str(tmp_path))
    sampler.sync(model, 0)
    pair.end(0)
    sampler.sync(model, 1)
    assert len(sampler.servers.in_use) == 1
    back = pair.back(0)
    back.model = copy.deepcopy(pair.student)
    sampler.sync(model, 2)
    assert len(sampler.servers.in_use) == 2 and back.adapters == [f"student-{sampler.run}-2"]
    assert UNLOAD in [path for path, _ in back.calls] and list(tmp_path.iterdir()) == []
    assert sampler.sample(PROMPTS, GREEDY, policy_version=2) == pair.expected(2)
