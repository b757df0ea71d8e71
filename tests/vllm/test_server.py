"""Sampling from a vLLM server: token ids both ways, and weights or adapters that reach it through
files. Tolerances as in test_sampler.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import Endpoint
from opdkit.sampling import HFSampler
from opdkit.sampling.server import ServerSampler, ServerSettings
from opdkit.sampling.servers import Server
from opdkit.types import Prompt, Sampling
from tests.vllm import test_adapters as adapters
from tests.vllm.conftest import FOLLOWS, build, questions
from tests.vllm.test_sampler import CLOSE, assert_drawn, move, without_numbers, worst

pytestmark = pytest.mark.vllm

GREEDY = Sampling(temperature=0, max_completion_length=24)


@pytest.fixture(scope="module")
def student() -> Any:
    model = build(3)
    model.generation_config.eos_token_id = list(range(2, 12))
    return model


@pytest.fixture(scope="module")
def sampler(server: str, student: Any, tokenizer: Any) -> ServerSampler:
    return ServerSampler(student, tokenizer, ServerSettings((server,)))


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[Prompt]:
    return [
        Prompt(f"q{i}", tokenizer(text)["input_ids"], {"answer": i})
        for i, text in enumerate(questions()[:4])
    ]


@pytest.mark.parametrize("stop", [(), ("e",)])
@pytest.mark.parametrize("prefix", [(), (20, 21, 22)])
def test_greedy_rollouts_are_those_of_the_sampler_in_this_process(
    sampler: ServerSampler,
    student: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    stop: Any,
    prefix: Any,
) -> None:
    sampling, asked = replace(GREEDY, stop=stop), [replace(p, prefix=list(prefix)) for p in prompts]
    ours = sampler.sample(asked, sampling, step=5, policy_version=7)
    assert without_numbers(ours) == without_numbers(
        HFSampler(student, tokenizer).sample(asked, sampling, step=5, policy_version=7)
    )
    assert worst(student, ours) < CLOSE


@pytest.mark.parametrize(
    "cuts",
    [{}, {"temperature": 0.7, "top_p": 0.8, "top_k": 50}, {"temperature": 0.8, "min_p": 0.05}],
)
def test_both_log_probs_are_exact_and_draws_are_keyed(
    sampler: ServerSampler, student: Any, prompts: list[Prompt], cuts: dict[str, Any]
) -> None:
    sampling = Sampling(max_completion_length=24, num_generations=3, **cuts)
    seen: list[int] = []
    rollouts = sampler.sample(prompts, sampling, seed=1, progress=seen.append)
    assert (
        worst(student, rollouts) < CLOSE
        and max(max(r.tokens) for r in rollouts) < 320
        and sorted(seen) == list(range(1, 13))
    )
    for r in rollouts:
        assert_drawn(student, r, sampling)
    alone = sampler.sample(prompts[2:3], sampling, seed=1)
    assert [r.tokens for r in alone] == [r.tokens for r in rollouts if r.group == "q2"]
    assert [r.tokens for r in sampler.sample(prompts[2:3], sampling, seed=2)] != [
        r.tokens for r in alone
    ]


def test_log_probs_follow_every_update_and_files_are_removed(
    sampler: ServerSampler, student: Any, prompts: list[Prompt]
) -> None:
    (served,) = sampler.servers.all
    probe: Any = served.probe
    for version in range(1, 4):
        before = probe.expected()
        move(student, version)
        sampler.sync(student, version)
        assert (
            probe.gap is not None
            and probe.gap < CLOSE
            and float((probe.expected() - before).abs().mean()) > 0.05
        )
        assert worst(student, sampler.sample(prompts, GREEDY, policy_version=version)) < CLOSE
    assert list(sampler.folder.iterdir()) == []


def test_an_update_that_does_not_arrive_stops_the_run(
    sampler: ServerSampler,
    student: Any,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Server, "_call", lambda *_: None)
        move(student, 10)
        with pytest.raises(UserError, match=r"sending weights to http.* not the student's"):
            sampler.sync(student, 4)
    with monkeypatch.context() as patch:
        # nothing lies in the folder, which is an error of the server
        patch.setattr("opdkit.sampling.server.save_weights", lambda weights, folder, dtype: None)
        patch.setattr(sampler.servers.endpoint, "sleep", lambda seconds: None)
        sampler.sync(student, 5)  # the step is done: the next draw says so
        with pytest.raises(UserError, match=r"(?s)holds no weights.*--worker-extension-cls"):
            sampler.sample(prompts, GREEDY, policy_version=5)
    sampler.sync(student, 6)
    assert worst(student, sampler.sample(prompts, GREEDY, policy_version=6)) < CLOSE


def test_adapters_alone(
    server: str, sampler: ServerSampler, tokenizer: Any, prompts: list[Prompt]
) -> None:
    """The server has the weights below them; each update is a new adapter, and former ones are
    unloaded.
    """
    model = adapters.student()
    base = build(0)
    ServerSampler(base, tokenizer, ServerSettings((server,))).sync(base, 0)
    mine = ServerSampler(model, tokenizer, ServerSettings((server,), enable_lora=True))
    for version in range(3):
        if version:
            adapters.move(model, version)
            mine.sync(model, version)
        rollouts = mine.sample(prompts, GREEDY, policy_version=version)
        gap = mine.servers.all[0].probe.gap  # type: ignore[union-attr]
        assert gap is not None and gap < CLOSE
        assert without_numbers(rollouts) == without_numbers(
            HFSampler(model, tokenizer).sample(prompts, GREEDY, policy_version=version)
        )
        drawn = mine.sample(
            prompts, Sampling(temperature=0.8, max_completion_length=8), policy_version=version
        )
        assert worst(model, rollouts) < CLOSE and worst(model, drawn) < CLOSE
    known = [card["id"] for card in Endpoint([server]).get("/v1/models")["data"]]
    assert known == ["tiny", mine.servers.name]
    send: Any = mine.staged(model, 3)
    [push] = send.args
    adapters.move(model, 9)  # what is sent is not what is expected now
    with pytest.raises(UserError, match=r"sending adapters to http.* not the student's"):
        mine._send(replace(push, expected=mine.probe.expected()))


def test_a_server_that_is_started_otherwise(
    serve: Callable[..., str], checkpoint: Callable[..., str], tokenizer: Any, prompts: list[Prompt]
) -> None:
    """Without the worker's methods no weights reach it; log-probs of the plain softmax alone do for
    plain sampling only.
    """
    url = serve(checkpoint(0, 320))
    student = build(0, rows=320)
    with pytest.raises(
        UserError,
        match=r"(?s)opdkit_load_folder.*VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-ext",
    ):
        ServerSampler(student, tokenizer, ServerSettings((url,))).sync(student, 0)
    with pytest.raises(UserError, match="does not serve 'other' but tiny"):
        ServerSampler(student, tokenizer, ServerSettings((url,), model="other"))
    with pytest.MonkeyPatch.context() as patch:
        # it holds the right weights from the start
        patch.setattr(Server, "_call", lambda *_: None)
        mine = ServerSampler(student, tokenizer, ServerSettings((url,)))
        assert len(mine.sample(prompts, GREEDY)) == 4
        with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
            mine.sample(prompts, Sampling(temperature=0.7, max_completion_length=8))


def test_one_of_two_ends_and_comes_back(
    serve: Callable[..., str],
    running: dict[str, subprocess.Popen[str]],
    checkpoint: Callable[..., str],
    tokenizer: Any,
    prompts: list[Prompt],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The run goes on with the other; with random weights again it is used once it was sent the
    student's.
    """
    urls = [serve(checkpoint(0), *FOLLOWS) for _ in range(2)]
    student = build(3)
    sampler = ServerSampler(student, tokenizer, ServerSettings(tuple(urls)))

    def check(version: int, alive: int) -> None:
        own = HFSampler(student, tokenizer).sample(prompts, GREEDY, policy_version=version)
        ours = sampler.sample(prompts, GREEDY, policy_version=version)
        assert without_numbers(ours) == without_numbers(own) and worst(student, ours) < CLOSE
        assert sampler.metrics() == {"sampler/servers": float(alive)}

    check(0, 2)
    running[urls[0]].terminate()
    running[urls[0]].wait(timeout=60)
    check(0, 1)
    move(student, 1)
    sampler.sync(student, 1)
    check(1, 1)
    serve(checkpoint(0), *FOLLOWS, port=urlsplit(urls[0]).port)
    check(1, 1)
    move(student, 2)
    sampler.sync(student, 2)
    check(2, 2)
    said = [line for line in capfd.readouterr().err.splitlines() if "opdkit: the samp" in line]
    assert len(said) == 2 and "is left out" in said[0] and "is back" in said[1]
