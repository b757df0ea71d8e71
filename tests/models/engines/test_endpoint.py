"""The HTTP client against real sockets: what is tried again and what is not, fail-over, order,
bounds.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from typing import Any

import pytest

from opdkit import UserError
from opdkit.models.engines.endpoint import BACKOFF, LONGEST_ASKED, REST, Endpoint, Refused
from tests.common.fake_server import Answer, FakeServer, Fault


@dataclass
class Echo(FakeServer):
    """Answers with what it was asked."""

    model: Any = None
    tokenizer: Any = None
    fail: dict[Any, int] = field(default_factory=dict)  # body's "n" -> status
    gate: Callable[[], Any] | None = None  # called while a request is under way

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if self.gate is not None:
            self.gate()
        if body.get("n") in self.fail:
            raise Answer(self.fail[body["n"]], f"no {body['n']}")
        return {"path": path, "body": body}


@dataclass
class Client:
    """An endpoint that notes its pauses instead of pausing."""

    urls: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.endpoint = Endpoint(
            self.urls,
            sleep=self.pauses.append,
            clock=lambda: self.now,
            rng=random.Random(0),
            what="the judge",
            **self.settings,
        )


def test_a_url_may_end_in_v1_or_have_a_path_of_its_own() -> None:
    with Echo() as server:
        for url, path in (
            ("", "/v1/models"),
            ("/v1", "/v1/models"),
            ("/v1/", "/v1/models"),
            ("/proxy/openai", "/proxy/openai/models"),
        ):
            assert Endpoint([server.url + url]).get("/v1/models") == {"path": path, "body": {}}
        assert Endpoint([server.url + "/v1"]).post("/generate", {"n": 1}) == {
            "path": "/generate",
            "body": {"n": 1},
        }


@pytest.mark.parametrize(
    "kind", ["408", "409", "425", "429", "500", "502", "503", "504", "close", "broken", "hang"]
)
def test_what_can_succeed_is_tried_again_with_growing_jittered_pauses(kind: str) -> None:
    with Echo(faults=[Fault(kind, times=3)]) as server:
        client = Client([server.url], {"timeout": 0.1 if kind == "hang" else 5.0})
        assert client.endpoint.post("/v1/x", {"n": 1})["body"] == {"n": 1}
        assert len(server.requests) == 4
    expected = random.Random(0)
    assert client.pauses == [expected.uniform(0, BACKOFF * 2**i) for i in range(3)]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302])
def test_what_cannot_succeed_is_not_tried_again_and_the_server_has_its_say(status: int) -> None:
    with Echo(fail={1: status}) as server:
        client = Client([server.url])
        with pytest.raises(
            Refused, match=f"the judge refuses POST {server.url}/v1/x with {status}: no 1"
        ) as caught:
            client.endpoint.post("/v1/x", {"n": 1})
        assert (caught.value.status, caught.value.message, caught.value.url) == (
            status,
            "no 1",
            server.url,
        )
        assert len(server.requests) == 1 and client.pauses == []


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("7", 7, 7),
        ("0.5", 0.5, 0.5),
        ("1e9", LONGEST_ASKED, LONGEST_ASKED),
        ("soon", 0, BACKOFF),
        ("-3", 0, BACKOFF),
    ],
)
def test_a_pause_that_a_server_asks_for_is_kept(said: str, least: float, most: float) -> None:
    with Echo(faults=[Fault("429")], retry_after=said) as server:
        client = Client([server.url])
        client.endpoint.post("/v1/x", {})
    assert len(client.pauses) == 1 and least <= client.pauses[0] <= most


def test_a_pause_may_be_asked_for_as_a_date() -> None:
    with Echo(
        faults=[Fault("503")], retry_after=formatdate(time.time() + 100, usegmt=True)
    ) as server:
        client = Client([server.url])
        client.endpoint.post("/v1/x", {})
    assert 60 < client.pauses[0] <= 100


def test_when_all_are_dead_the_error_says_what_each_of_them_said() -> None:
    with Echo() as gone:
        pass
    with Echo(faults=[Fault("500", times=0)]) as ill:
        client = Client([gone.url, ill.url], {"retries": 2})
        with pytest.raises(
            UserError, match="the judge does not answer POST /v1/x, tried 3 times"
        ) as caught:
            client.endpoint.post("/v1/x", {})
        assert f"{gone.url}: ConnectError" in str(
            caught.value
        ) and f"{ill.url}: 500 out of memory" in str(caught.value)
        assert len(ill.requests) == 3


def test_a_dead_server_is_left_alone_while_others_answer_and_comes_back() -> None:
    """No pause: the next server is asked at once. After its rest one request tries the dead one."""
    with Echo() as good:
        with Echo() as dead:
            pass
        client = Client([dead.url, good.url])
        for n in range(5):
            client.endpoint.post("/v1/x", {"n": n})
        assert len(good.requests) == 5 and client.pauses == []
        with Echo(port=dead.port) as back:
            client.endpoint.post("/v1/x", {"n": 5})
            assert len(back.requests) == 0
            client.now += REST
            client.endpoint.post("/v1/x", {"n": 6})
            assert [r["n"] for r in back.requests] == [6]
            good.faults = [Fault("500", times=0)]
            client.endpoint.post("/v1/x", {"n": 7})
            assert [r["n"] for r in back.requests] == [6, 7] and client.pauses == []


def test_results_keep_the_order_and_requests_are_spread_but_bounded() -> None:
    most, under_way, lock, enough = 0, 0, threading.Lock(), threading.Event()

    def gate() -> None:
        nonlocal most, under_way
        with lock:
            under_way += 1
            most = max(most, under_way)
            if most == 4:
                enough.set()
        enough.wait(5)
        with lock:
            under_way -= 1

    with Echo(gate=gate) as a, Echo(gate=gate) as b:
        endpoint, ticks = Endpoint([a.url, b.url], concurrency=4), []
        answers = endpoint.map(
            [partial(endpoint.post, "/v1/x", {"n": n}) for n in range(20)], ticks.append
        )
        assert [answer["body"]["n"] for answer in answers] == list(range(20))
        assert most == 4 and ticks == list(range(1, 21))
        assert min(len(a.requests), len(b.requests)) >= 2
    assert endpoint.map([]) == []


def test_the_first_failure_ends_all_even_those_that_pause() -> None:
    """The first request is asked to pause for long; the failure of another ends the wait."""
    with Echo(fail={1: 429, 3: 400}, retry_after="200") as server:
        endpoint = Endpoint([server.url], concurrency=2)
        start = time.monotonic()
        with pytest.raises(Refused, match="no 3"):
            endpoint.map(
                [partial(endpoint.post, "/v1/x", {"n": n}) for n in [1, 3, *range(4, 100)]]
            )
        assert time.monotonic() - start < 5
        assert len(server.requests) < 10


def test_the_key_comes_from_the_environment_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    with Echo(faults=[Fault("401")]) as server:
        endpoint = Endpoint([server.url], key_variable="MY_KEY")
        with pytest.raises(Refused, match="its key is read from MY_KEY") as caught:
            endpoint.post("/v1/x", {})
        assert server.headers[0]["Authorization"] == "Bearer sesame"
        assert "sesame" not in repr(endpoint) + str(caught.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="environment variable MY_KEY, which is not set: export it"):
        Endpoint([server.url], key_variable="MY_KEY")


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Echo() as server:
        assert Endpoint([server.url], retries=0).get("/v1/models")["path"] == "/v1/models"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="must start with http:// or https://"):
        Endpoint([url])


def test_an_answer_that_is_no_object_is_broken() -> None:
    class List(Echo):
        def answer(self, path: str, body: dict[str, Any]) -> Any:
            return [1]

    with List() as server:
        client = Client([server.url], {"retries": 1})
        with pytest.raises(UserError, match="a JSON object was expected, not list"):
            client.endpoint.get("/v1/models")
