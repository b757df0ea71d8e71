"""One exchange over HTTP: however a server answers, it ends in time, in little memory, and shows no
key.
"""

from __future__ import annotations

from typing import Any

import pytest

from opdkit import UserError
from opdkit.models.engines.endpoint import Endpoint, Refused
from opdkit.models.engines.exchange import MOST, SAID, address
from tests.common.fake_server import FakeServer
from tests.hostile.faults import KEY, TRANSPORT, Server

FAULTS = {fault.name: fault for fault in TRANSPORT}


class Ready(FakeServer):
    """It has no model and is asked for no scores."""

    def __init__(self) -> None:
        super().__init__(None, None)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        return {"path": path}


def said(name: str, **settings: Any) -> str:
    """What the error is where a server goes wrong."""
    with Server(Ready(), FAULTS[name]) as server:
        endpoint = Endpoint([server.url], **({"timeout": 0.3, "retries": 0} | settings))
        with pytest.raises(UserError) as caught:
            endpoint.post("/v1/completions", {})
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "no answer",
        "the body a byte at a time",
        "headers a byte at a time",
        "a header now and then",
        "endless interim answers",
    ],
)
def test_no_answer_outlives_its_deadline(name: str) -> None:
    """Each byte would begin the wait anew, were it one read's."""
    assert "no answer within 0.3 s" in said(name)


@pytest.mark.parametrize("name", ["an endless body", "an endless body in chunks"])
def test_bodies_are_read_as_far_as_was_asked_for(name: str) -> None:
    assert f"more than the {MOST} bytes" in said(name, timeout=20.0)


def test_nothing_compressed_is_read() -> None:
    """Also what is small and right: 3 MB may be 3 GB."""
    told = said("gzip, small and right", timeout=20.0)
    assert "its body is encoded as gzip, which was not asked for" in told


def test_a_long_error_is_cut() -> None:
    assert len(said("500 of 20 MB", timeout=20.0)) < SAID + 300


def test_control_characters_do_not_reach_the_screen() -> None:
    assert said("error text in control characters").isprintable()


@pytest.mark.parametrize("name", ["401 with the key in it", "500 with the key in it"])
def test_a_key_that_a_server_shows_is_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    told = said(name, key_variable="MY_KEY")
    assert KEY not in told and "is no key of mine" in told


@pytest.mark.parametrize("key", ["two words", "a\n", "schlüssel"])
def test_keys_that_no_header_carries(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match="the key of the server in MY_KEY") as caught:
        Endpoint(["http://127.0.0.1:9"], key_variable="MY_KEY")
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@host:8000",
        "https://hunter2@host/v1",
        "http://host:8000/v1?key=hunter2",
        "http://host/#hunter2",
        "http://me:hunter2@host:port",
        "ftp://me:hunter2@host",
        "http://me:hunter2@[host",
    ],
)
def test_an_address_has_no_secret_in_it(url: str) -> None:
    with pytest.raises(UserError) as caught:
        address(url, "the teacher's server")
    assert "hunter2" not in str(caught.value)


def test_an_answer_of_another_form_is_broken_whatever_reading_it_raises() -> None:
    with Server(Ready()) as server:
        endpoint = Endpoint([server.url], retries=0)
        for error in (TypeError, KeyError, AttributeError, OverflowError, RuntimeError):

            def read(reply: Any, error: type[Exception] = error) -> None:
                raise error("x" * 10_000)

            with pytest.raises(UserError, match=r"rollout 7: .*127.*a broken answer") as caught:
                endpoint.about("rollout 7", "/v1/completions", {}, lambda reply, who: read(reply))
            assert len(str(caught.value)) < 2 * SAID
            assert not isinstance(caught.value, Refused)
