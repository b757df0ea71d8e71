"""`opdkit serve-teacher`: across HTTP a teacher says what it says in this process, to the bit, and refuses what it cannot read."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdkit import UserError, endpoint
from opdkit.cli import main
from opdkit.endpoint import Endpoint, Refused
from opdkit.engines import shared_vocabulary
from opdkit.facts import Needs
from opdkit.maths import JSD, ReverseKL
from opdkit.models import head_of, real_vocabulary
from opdkit.teachers import LocalModel, Routed, scoring, server
from opdkit.teachers.base import cut, heads_of
from opdkit.teachers.serve import Service, TeacherServer, make_server
from opdkit.teachers.spec import Server
from opdkit.train.gather import gather
from opdkit.types import EntropyFact, Fact, GapFact, LogpAtFact, LogpFact, TopFact, VocabularyFact
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.train.rows import naive_logps, rollouts

NUMBERS: tuple[Fact, ...] = (
    LogpFact("teacher"),
    EntropyFact("teacher"),
    TopFact("teacher", 3),
    LogpAtFact("teacher", "teacher", 3),
    LogpAtFact("teacher", "student", 4),
)
WHOLE: tuple[Fact, ...] = (*NUMBERS, GapFact(ReverseKL(), "student", "teacher"), GapFact(JSD(0.3), "student", "teacher", 2.0))


@contextmanager
def serving(*models: Any, tokenizer: Any = None, name: str = "T", **settings: Any) -> Iterator[list[TeacherServer]]:
    """A server per model, on free ports."""
    with ExitStack() as stack:
        servers = []
        for model in models:
            one = make_server(model, tokenizer or tiny_tokenizer(), name, port=0, **settings)
            thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
            thread.start()
            stack.callback(one.server_close)
            stack.callback(one.shutdown)
            servers.append(one)
        yield servers


def url(one: TeacherServer) -> str:
    return f"http://127.0.0.1:{one.server_address[1]}"


def opened(facts: tuple[Fact, ...], *servers: TeacherServer, tokenizer: Any = None) -> Any:
    spec = Server(tuple(map(url, servers)), retries=0)
    return server.open_teacher(spec, SimpleNamespace(needs=Needs(frozenset(facts)), name="mine"), tokenizer or tiny_tokenizer())


def gathered(facts: tuple[Fact, ...], teacher: Any, student: Any, vocab: int | None = None) -> Mapping[Fact, torch.Tensor]:
    local = LocalModel(student, head_of(student, vocab))
    batch = gather(rollouts(), Needs(frozenset(facts)), {"student": local, "teacher": cut(teacher, vocab)})
    return {fact: batch.read(fact) for fact in facts}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("qwen3", torch.float32), ("gemma2", torch.float32), ("granite", torch.bfloat16), ("cohere", torch.float32)],
)
def test_every_fact_is_the_local_teachers_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    """Also of heads with a scale, a cap or tied weights; with many small requests, and with one."""
    teacher, student = tiny_model(kind, seed=2).to(dtype), tiny_model("qwen3", seed=1)
    for budget in (8, None):
        local = gathered(WHOLE, LocalModel(teacher, head_of(teacher), budget), student)
        with serving(teacher, teacher, max_batch_tokens=budget) as (one, two):
            numbers = gathered(NUMBERS, opened(NUMBERS, one, two), student)
            whole = gathered(WHOLE, opened(WHOLE, one, two), student)
        for fact in NUMBERS:
            torch.testing.assert_close(numbers[fact], local[fact], rtol=0, atol=1e-6)
        for fact in WHOLE:
            assert torch.equal(whole[fact], local[fact]), fact


def test_rows_that_only_pad_the_teachers_head_are_cut() -> None:
    """The student's head has the tokenizer's 320 rows, the teacher's 384; the local teacher is cut to 320."""
    teacher, student, tokenizer = tiny_model("llama", vocab_size=384, seed=2), tiny_model("qwen3", seed=1), tiny_tokenizer()
    local = LocalModel(teacher, head_of(teacher))
    known = real_vocabulary(tokenizer)
    vocab = shared_vocabulary([head_of(student), head_of(teacher)], known)
    assert vocab == known < 384
    expected = gathered(WHOLE, local, student, vocab)
    with serving(teacher) as (one,):
        numbers = gathered(NUMBERS, opened(NUMBERS, one), student, vocab)
        whole = opened(WHOLE, one)
        assert [len(h.weight) for h in heads_of(whole)] == [384]
        given = gathered(WHOLE, whole, student, vocab)
        answer = Endpoint([url(one)]).post("/v1/completions", {"prompt": [5, 6], "max_tokens": 1, "prompt_logprobs": 384})
    for fact in NUMBERS:
        torch.testing.assert_close(numbers[fact], expected[fact], rtol=0, atol=1e-6)
    assert all(torch.equal(given[fact], expected[fact]) for fact in WHOLE)
    entry = answer["choices"][0]["prompt_logprobs"][1]
    assert len(entry) == known and sum(torch.tensor([e["logprob"] for e in entry.values()]).exp()) == pytest.approx(1, abs=1e-5)


def test_a_served_teacher_among_local_ones_by_route() -> None:
    a, b, student = tiny_model("llama", seed=2), tiny_model("qwen3", seed=3), tiny_model("qwen3", seed=1)
    rows = [replace(r, row={"teacher": name}) for r, name in zip(rollouts(), "abbab")]
    needs = Needs(frozenset(WHOLE))

    def facts(first: Any) -> Any:
        scorers = {
            "student": LocalModel(student, head_of(student)),
            "teacher": Routed({"a": first, "b": LocalModel(b, head_of(b))}),
        }
        batch = gather(rows, needs, scorers)
        return [batch.read(fact) for fact in WHOLE]

    with serving(a) as (one,):
        given = facts(opened(WHOLE, one))
    for x, y in zip(given, facts(LocalModel(a, head_of(a)))):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_no_positions_need_no_request() -> None:
    teacher, student = tiny_model("llama", seed=2), tiny_model("qwen3", seed=1)
    empty = rollouts(lengths=((3, 0), (2, 0)))
    with serving(teacher) as (one,):
        for facts in (NUMBERS, WHOLE):
            scorers = {"student": LocalModel(student, head_of(student)), "teacher": opened(facts, one)}
            batch = gather(empty, Needs(frozenset(facts)), scorers)
            assert batch.read(NUMBERS[0]).shape == (2, 0)


# ------------------------------------------------------------------------------------------------------------ OpenAI form


def test_completions_have_vllms_form_whatever_comes_together() -> None:
    """Twenty prompts at once, by one request or by twenty: every token's entry holds its own id and the k most probable ones."""
    teacher = tiny_model("llama", seed=2)
    rows, tokenizer = rollouts(lengths=[(1, n) for n in range(20)]), tiny_tokenizer()
    prompts = [r.prompt + r.tokens for r in rows]
    with serving(teacher, tokenizer=tokenizer, max_batch_tokens=64) as (one,):
        client = Endpoint([url(one)])
        ask = {"model": "T", "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2}
        together = client.post("/v1/completions", {**ask, "prompt": prompts})["choices"]
        with ThreadPoolExecutor(20) as pool:
            apart = list(pool.map(lambda p: client.post("/v1/completions", {**ask, "prompt": p})["choices"][0], prompts))
    for choices in (together, apart):
        for row, choice in zip(rows, choices):
            entries, expected = choice["prompt_logprobs"], naive_logps(teacher, row)
            assert entries[0] is None and len(entries) == 1 + len(row.tokens)
            for token, entry, logps in zip(row.tokens, entries[1:], expected):
                best = logps.topk(2).indices.tolist()
                assert set(map(int, entry)) == {token, *best}
                assert [entry[str(i)]["rank"] for i in best] == [1, 2]
                for i, said in entry.items():
                    assert said["logprob"] == pytest.approx(logps[int(i)].item(), abs=1e-5)
                    assert said["decoded_token"] == tokenizer.decode([int(i)])


WRONG = {
    "an id too large": ({"prompt": [5, 320]}, 400, "Token id 320 is out of vocabulary: the prompt may hold 0 to 319"),
    "a long prompt": ({"prompt": [5] * 4096}, 400, "maximum context length is 4096 tokens. However, the prompt has 4096"),
    "text": ({"prompt": "hello"}, 400, "prompt must be token ids"),
    "nothing": ({"prompt": []}, 400, "prompt must be token ids"),
    "another model": ({"prompt": [5], "model": "U"}, 404, "The model `U` does not exist: this server has T"),
    "writing": ({"prompt": [5], "max_tokens": 20}, 400, "this server writes nothing"),
    "no scores": ({"prompt": [5], "prompt_logprobs": None}, 400, "this server scores prompts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_requests_that_cannot_be_answered(name: str) -> None:
    body, status, words = WRONG[name]
    with serving(tiny_model("llama")) as (one,), pytest.raises(Refused) as caught:
        Endpoint([url(one)]).post("/v1/completions", {"max_tokens": 1, "prompt_logprobs": 1, **body})
    assert caught.value.status == status and words in caught.value.message


def test_other_paths_and_bodies() -> None:
    with serving(tiny_model("llama")) as (one,):
        client = Endpoint([url(one)], retries=0)
        assert client.get("/health") == {}
        for method, path, body, status in (
            ("GET", "/v1/chat", None, 404),
            ("POST", "/score", b"junk", 400),
            ("POST", "/v1/completions", b"[]", 400),
            ("POST", "/v1/completions", b"{", 400),
        ):
            with pytest.raises(Refused) as caught:
                client.request(method, path, body, lambda response: response.content)
            assert caught.value.status == status


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_other_tokenizers_and_other_weights_are_refused() -> None:
    words = ["completely different words of another language entirely"] * 3
    with serving(tiny_model("llama", seed=2), tiny_model("llama", seed=3)) as (one, two):
        with pytest.raises(
            UserError, match=r"tokenizer of the teacher's server is not the student's: the tokenizers .* differ in"
        ):
            opened(NUMBERS, one, tokenizer=tiny_tokenizer(words))
        with pytest.raises(UserError, match="all call their model 'T', but their weights differ"):
            opened(NUMBERS, one, two)


def test_a_server_started_again_with_other_weights_is_noticed() -> None:
    student = tiny_model("qwen3", seed=1)
    with serving(tiny_model("llama", seed=2), tiny_model("llama", seed=3)) as (one, two):
        for facts in (NUMBERS, WHOLE):
            teacher = opened(facts, one)
            teacher.endpoint = Endpoint([url(two)])
            with pytest.raises(UserError, match="the server was started again with another"):
                gathered(facts, teacher, student)


def test_hidden_states_that_are_no_numbers_name_their_rollout() -> None:
    """The last token of the second rollout is the only one whose embedding is broken."""
    teacher, student = tiny_model("llama", seed=2), tiny_model("qwen3", seed=1)
    rows = rollouts(lengths=((2, 2), (2, 2)))
    broken = 299
    rows[1] = replace(rows[1], tokens=[broken, 5])
    with serving(teacher) as (one,):
        scorers = {"student": LocalModel(student, head_of(student)), "teacher": opened(NUMBERS, one)}
        with torch.no_grad():
            teacher.get_input_embeddings().weight[broken] = float("nan")
        with pytest.raises(
            UserError, match=r"^rollouts 0/0/0, 0/1/0 at T .*not finite for rollout 0/1/0: .*Nothing was learnt from this step"
        ):
            gather(rows, Needs(frozenset(NUMBERS)), scorers)


def test_a_body_cut_short_is_broken_not_believed() -> None:
    body = scoring.pack({"x": torch.arange(3)}, {"a": 1})
    tensors, settings = scoring.unpack(body)
    assert tensors["x"].tolist() == [0, 1, 2] and settings == {"a": 1}
    for cut_short in (body[:-1], body[:20], b""):
        with pytest.raises(ValueError, match="not a safetensors body"):
            scoring.unpack(cut_short)


# ----------------------------------------------------------------------------------------------------------- command line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_command_serves_until_it_is_told_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while a request is under way: it is answered, and the exit code is 0."""
    monkeypatch.setattr(endpoint, "BACKOFF", 0.02)
    entered, stopping = threading.Event(), threading.Event()
    score, drain = Service.completions, TeacherServer.drain

    def slow(service: Service, given: Any) -> Any:
        entered.set()
        assert stopping.wait(10)
        return score(service, given)

    def draining(server: TeacherServer) -> None:
        stopping.set()
        drain(server)

    monkeypatch.setattr(Service, "completions", slow)
    monkeypatch.setattr(TeacherServer, "drain", draining)
    model, port = save_tiny(tmp_path / "teacher", seed=2), free_port()
    client = Endpoint([f"http://127.0.0.1:{port}"], retries=12)

    def visit() -> Any:
        assert client.get("/v1/models")["data"][0]["id"] == "big"
        return client.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 0, "prompt_logprobs": 0})

    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(visit)
        pool.submit(lambda: entered.wait(10) and os.kill(os.getpid(), signal.SIGTERM))
        assert main(["serve-teacher", model, "--port", str(port), "--name", "big"]) == 0
    assert list(answer.result()["choices"][0]["prompt_logprobs"][1]) == ["6"]
    out = capsys.readouterr().out
    assert f"serving big (float32, cpu) at http://127.0.0.1:{port}" in out and out.endswith("stopped\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "whoever reaches it can read the model's head and use the machine"),
        (["--max-batch-tokens", "0"], "max_batch_tokens=0 must be at least 1"),
    ],
)
def test_settings_that_will_not_do(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve-teacher", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_port_in_use() -> None:
    with (
        serving(tiny_model("llama")) as (one,),
        pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:.* choose another with --port"),
    ):
        make_server(tiny_model("llama"), tiny_tokenizer(), "T", port=one.server_address[1])


def test_a_method_that_needs_the_whole_vocabulary_gets_it() -> None:
    with serving(tiny_model("llama", seed=2)) as (one,):
        assert isinstance(opened((VocabularyFact("teacher"),), one), server.HiddenStates)
        assert isinstance(opened((LogpFact("teacher"),), one), server.Numbers)
