"""`opdkit serve-teacher`: across HTTP a teacher says what it says in this process, to the bit, and
refuses what it cannot read.
"""

from __future__ import annotations

import json
import os
import resource
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

import httpx2
import pytest
import safetensors.torch
import torch

from opdkit import UserError
from opdkit.cli import main
from opdkit.models.body import head_of, shared_vocabulary
from opdkit.models.engines import endpoint
from opdkit.models.engines.endpoint import Endpoint, Refused
from opdkit.models.layout import Layout
from opdkit.models.tokenizers import real_vocabulary
from opdkit.objective.divergences import JSD, ReverseKL
from opdkit.objective.facts import (
    EntropyFact,
    Fact,
    GapFact,
    LogpAtFact,
    LogpFact,
    TopFact,
    VocabularyFact,
)
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel, Routed, client_serve, front, protocol, service
from opdkit.teachers.base import cut, heads_of
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.http import TeacherServer
from opdkit.teachers.serve import make_server
from opdkit.teachers.server import ServerTeacher
from opdkit.teachers.service import Service
from opdkit.train.gather import gather
from tests.common.rounding import FORWARD
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.train.rows import naive_logps, rollouts

NUMBERS: tuple[Fact, ...] = (
    LogpFact("teacher"),
    EntropyFact("teacher"),
    TopFact("teacher", 3),
    LogpAtFact("teacher", "teacher", 3),
    LogpAtFact("teacher", "student", 4),
)
WHOLE: tuple[Fact, ...] = (
    *NUMBERS,
    GapFact(ReverseKL(), "student", "teacher"),
    GapFact(JSD(0.3), "student", "teacher", 2.0),
)


@contextmanager
def serving(
    *models: Any, tokenizer: Any = None, name: str = "T", **settings: Any
) -> Iterator[list[TeacherServer]]:
    """A server per model, on free ports."""
    with ExitStack() as stack:
        servers = []
        for model in models:
            one = make_server(model, tokenizer or tiny_tokenizer(), name, port=0, **settings)
            thread = threading.Thread(
                target=one.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True
            )
            thread.start()
            stack.callback(one.server_close)
            stack.callback(one.shutdown)
            servers.append(one)
        yield servers


def url(one: TeacherServer) -> str:
    return f"http://127.0.0.1:{one.server_address[1]}"


def opened(facts: tuple[Fact, ...], *servers: TeacherServer, tokenizer: Any = None) -> Any:
    method: Any = SimpleNamespace(needs=Needs(frozenset(facts)), name="mine")
    context = TeacherContext(method, tokenizer or tiny_tokenizer())
    return ServerTeacher(tuple(map(url, servers)), retries=0).open(context)


def gathered(
    facts: tuple[Fact, ...], teacher: Any, student: Any, vocab: int | None = None
) -> Mapping[Fact, torch.Tensor]:
    local = LocalModel(student, head_of(student, vocab))
    batch = gather(
        rollouts(), Needs(frozenset(facts)), {"student": local, "teacher": cut(teacher, vocab)}
    )
    return {fact: batch.read(fact) for fact in facts}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("qwen3", torch.float32),
        ("gemma2", torch.float32),
        ("granite", torch.bfloat16),
        ("cohere", torch.float32),
    ],
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
            torch.testing.assert_close(numbers[fact], local[fact], rtol=0, atol=FORWARD)
        for fact in WHOLE:
            assert torch.equal(whole[fact], local[fact]), fact


def test_rows_that_only_pad_the_teachers_head_are_cut() -> None:
    """The student's head has the tokenizer's 320 rows, the teacher's 384; the local teacher is cut
    to 320.
    """
    teacher, student, tokenizer = (
        tiny_model("llama", vocab_size=384, seed=2),
        tiny_model("qwen3", seed=1),
        tiny_tokenizer(),
    )
    local = LocalModel(teacher, head_of(teacher))
    known = real_vocabulary(tokenizer)
    vocab = shared_vocabulary([head_of(student), head_of(teacher)], tokenizer)
    assert vocab == known < 384
    expected = gathered(WHOLE, local, student, vocab)
    with serving(teacher) as (one,):
        numbers = gathered(NUMBERS, opened(NUMBERS, one), student, vocab)
        whole = opened(WHOLE, one)
        assert [len(h.weight) for h in heads_of(whole)] == [384]
        given = gathered(WHOLE, whole, student, vocab)
        answer = Endpoint([url(one)]).post(
            "/v1/completions", {"prompt": [5, 6], "max_tokens": 1, "prompt_logprobs": 384}
        )
    for fact in NUMBERS:
        torch.testing.assert_close(numbers[fact], expected[fact], rtol=0, atol=FORWARD)
    assert all(torch.equal(given[fact], expected[fact]) for fact in WHOLE)
    entry = answer["choices"][0]["prompt_logprobs"][1]
    assert len(entry) == known and sum(
        torch.tensor([e["logprob"] for e in entry.values()]).exp()
    ) == pytest.approx(1, abs=1e-5)


def test_a_served_teacher_among_local_ones_by_route() -> None:
    a, b, student = (
        tiny_model("llama", seed=2),
        tiny_model("qwen3", seed=3),
        tiny_model("qwen3", seed=1),
    )
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
            scorers = {
                "student": LocalModel(student, head_of(student)),
                "teacher": opened(facts, one),
            }
            batch = gather(empty, Needs(frozenset(facts)), scorers)
            assert batch.read(NUMBERS[0]).shape == (2, 0)


# -------------------------------------------------------------------------------------- OpenAI form


def test_completions_have_vllms_form_whatever_comes_together() -> None:
    """Twenty prompts at once, by one request or by twenty: every token's entry holds its own id and
    the k most probable ones.
    """
    teacher = tiny_model("llama", seed=2)
    rows, tokenizer = rollouts(lengths=[(1, n) for n in range(20)]), tiny_tokenizer()
    prompts = [r.prompt + r.tokens for r in rows]
    with serving(teacher, tokenizer=tokenizer, max_batch_tokens=64) as (one,):
        client = Endpoint([url(one)])
        ask = {"model": "T", "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2}
        together = client.post("/v1/completions", {**ask, "prompt": prompts})["choices"]
        with ThreadPoolExecutor(20) as pool:
            apart = list(
                pool.map(
                    lambda p: client.post("/v1/completions", {**ask, "prompt": p})["choices"][0],
                    prompts,
                )
            )
    for choices in (together, apart):
        for row, choice in zip(rows, choices):
            entries, expected = choice["prompt_logprobs"], naive_logps(teacher, row)
            assert entries[0] is None and len(entries) == 1 + len(row.tokens)
            for token, entry, logps in zip(row.tokens, entries[1:], expected):
                best = logps.topk(2).indices.tolist()
                assert set(map(int, entry)) == {token, *best}
                assert [entry[str(i)]["rank"] for i in best] == [1, 2]
                for i, said in entry.items():
                    assert said["logprob"] == pytest.approx(logps[int(i)].item(), abs=FORWARD)
                    assert said["decoded_token"] == tokenizer.decode([int(i)])


WRONG = {
    "an id too large": (
        {"prompt": [5, 320]},
        400,
        "Token id 320 is out of vocabulary: the prompt may hold 0 to 319",
    ),
    "a long prompt": (
        {"prompt": [5] * 4096},
        400,
        "maximum context length is 4096 tokens. However, the prompt has 4096",
    ),
    "text": ({"prompt": "hello"}, 400, "prompt must be token ids"),
    "nothing": ({"prompt": []}, 400, "prompt must be token ids"),
    "another model": (
        {"prompt": [5], "model": "U"},
        404,
        "The model `U` does not exist: this server has T",
    ),
    "writing": ({"prompt": [5], "max_tokens": 20}, 400, "this server writes nothing"),
    "no scores": ({"prompt": [5], "prompt_logprobs": None}, 400, "this server scores prompts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_requests_that_cannot_be_answered(name: str) -> None:
    body, status, words = WRONG[name]
    with serving(tiny_model("llama")) as (one,), pytest.raises(Refused) as caught:
        Endpoint([url(one)]).post(
            "/v1/completions", {"max_tokens": 1, "prompt_logprobs": 1, **body}
        )
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


def int64(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def fact(name: str, **values: Any) -> dict[str, Any]:
    return {"fact": name, "model": "teacher", **values}


TOP = fact("TopFact", k=3)
# what is changed in a good request of three rollouts, and what is said
TOO_MUCH: dict[str, tuple[dict[str, Any], str]] = {
    "a response of 10^9 tokens": (
        {"responses": int64(10**9, 4, 3)},
        "add up to 1000000014, and 19 tokens are given",
    ),
    "a prompt of 2^62 tokens": (
        {"prompts": int64(2**62, 3, 2)},
        "add up to 4611686018427387921, and 19 tokens",
    ),
    "lengths that cancel": (
        {"prompts": int64(2**63 - 1, 3, 2), "responses": int64(5, -(2**63), 3)},
        "a length is -92233720368",
    ),
    "a negative length": (
        {"responses": int64(5, -4, 11)},
        "a length is -4: prompts and responses have at least one token",
    ),
    "a prompt of nothing": ({"prompts": int64(0, 3, 4)}, "a length is 0"),
    "a token too many": (
        {"tokens": torch.ones(20, dtype=torch.int64)},
        "add up to 19, and 20 tokens are given",
    ),
    "lengths of other rollouts": (
        {"prompts": int64(2, 3)},
        "3 rollouts, 2 lengths of prompts and 3 of responses",
    ),
    "no lengths": ({"prompts": None}, "no tensor 'prompts'"),
    "lengths that are fractions": (
        {"responses": torch.tensor([5.0, 4.0, 3.0])},
        "'responses' is torch.float32 [3], where int64",
    ),
    "truths for tokens": (
        {"tokens": torch.ones(19, dtype=torch.bool)},
        "'tokens' is torch.bool [19], where int64, one row",
    ),
    "lengths in a table": (
        {"prompts": int64([2, 3, 2])},
        "'prompts' is torch.int64 [1, 3], where int64, one row",
    ),
    "a single number": (
        {"positions": torch.tensor(3)},
        "'positions' is torch.int64 [], where int64, one row",
    ),
    "an id too large": ({"tokens": int64(*[5] * 18, 320)}, "Token id 320 is out of vocabulary"),
    "a negative id": ({"tokens": int64(-1, *[5] * 18)}, "Token id -1 is out of vocabulary"),
    "an id behind the rows kept": (
        {"tokens": int64(*[5] * 18, 319), "vocab": 300},
        "Token id 319 is out of vocabulary",
    ),
    "a position far away": (
        {"positions": int64(0, 10**15)},
        "position 1000000000000000 is in no response: there are 15 in 5",
    ),
    "a position before the first": ({"positions": int64(-1, 0)}, "position -1 is in no response"),
    "a position behind a response": ({"positions": int64(0, 9)}, "position 9 is in no response"),
    "a position twice": ({"positions": int64(0, 1, 1)}, "a position is asked about more than once"),
    "more entries than the vocabulary": (
        {"facts": [fact("TopFact", k=321)]},
        "k=321, which must be a whole number from 1 to 320",
    ),
    "10^12 entries": (
        {"facts": [fact("LogpAtFact", owner="teacher", k=10**12)]},
        "LogpAtFact has k=1000000000000, which",
    ),
    "fewer than none": ({"facts": [fact("TopFact", k=-1)]}, "k=-1, which must be a whole number"),
    "a truth for a number": (
        {"facts": [fact("TopFact", k=True)]},
        "k=True, which must be a whole number",
    ),
    "a fraction": ({"facts": [fact("TopFact", k=3.0)]}, "k=3.0, which must be a whole number"),
    "more rows than there are": (
        {"vocab": 10**9},
        "vocab=1000000000 must be null or a whole number from 1 to 320",
    ),
    "rows that are none": ({"vocab": False}, "vocab=False must be null"),
    "a fact that is none": ({"facts": [{"fact": ["LogpFact"]}]}, "['LogpFact'] is not a fact"),
    "a fact with more": (
        {"facts": [fact("LogpFact", k=3)]},
        "LogpFact is given by model, not by ['k', 'model']",
    ),
    "a model that is no name": (
        {"facts": [{"fact": "LogpFact", "model": []}]},
        "model=[], which must be a name",
    ),
    "a fact in no list": ({"facts": TOP}, "'facts' is {'fact': 'TopFact'"),
    "two models": ({"facts": [TOP, {"fact": "LogpFact", "model": "other"}]}, "facts of 2 models"),
    "names that are numbers": (
        {"rollouts": [1, 2, 3]},
        "'rollouts' is [1, 2, 3], where a list of str is expected",
    ),
    "a name too few": ({"rollouts": ["a", "b"]}, "2 rollouts, 3 lengths of prompts"),
    "ids that are not given": ({"ids 0": None}, "no tensor 'ids 0'"),
    "ids that are not said": ({"ids": []}, "the top 4 ids of 'student' are not given"),
    "fewer ids than positions": (
        {"ids 0": torch.ones(2, 4, dtype=torch.int64)},
        "'ids 0' is torch.int64 [2, 4], where int64, [12, 4]",
    ),
    "ids too large": (
        {"ids 0": torch.full((12, 4), 320)},
        "'ids 0' holds ids that are not from 0 to 319",
    ),
    "its own ids": ({"ids": [fact("TopFact", k=4)]}, "only the top ids of other models can be"),
    "other settings": ({"settings": "[]"}, "its settings are no mapping"),
    "settings a thousand deep": ({"settings": "[" * 10**5}, "the body is no request for scores"),
}


def request(**changed: Any) -> bytes:
    """Three rollouts of 2 + 5, 3 + 4 and 2 + 3 tokens, every fact at every position; then what is
    changed.
    """
    rows = rollouts(lengths=((2, 5), (3, 4), (2, 3)))
    layout, at = Layout(rows, 5), int64(*range(5), *range(5, 9), *range(10, 13))
    ids = {TopFact("student", 4): torch.arange(48).view(12, 4)}
    tensors, settings = protocol.unpack(protocol.pack_request(layout, at, NUMBERS, ids, None))
    whole = changed.pop("settings", None)
    for name, value in changed.items():
        (settings if name in ("rollouts", "facts", "ids", "vocab") else tensors)[name] = value
    given = {name: t for name, t in tensors.items() if t is not None}
    return (
        protocol.pack(given, settings)
        if whole is None
        else safetensors.torch.save(given, {"settings": whole})
    )


def test_what_a_request_says_must_be_what_it_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused before anything is scored and without the memory it speaks of; the server
    goes on and says the same as before.
    """
    with serving(tiny_model("llama", seed=2)) as (one,):
        service, client = one.services["T"], Endpoint([url(one)], retries=0)

        def ask(body: bytes) -> bytes:
            return client.request("POST", "/score", body, lambda response: response.content)

        good = ask(request())
        assert len(protocol.unpack(good)[0]) == len(NUMBERS)
        peak, scored = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
        with monkeypatch.context() as patch:
            patch.setattr(service.worker, "submit", lambda *work: scored.append(work))
            for name, (changed, words) in TOO_MUCH.items():
                with pytest.raises(Refused) as caught:
                    ask(request(**changed))
                assert caught.value.status == 400 and words in caught.value.message, (
                    name,
                    caught.value.message,
                )
        assert scored == []
        # KiB; the first one alone speaks of 20 GiB
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + (64 << 10)
        assert ask(request()) == good


def test_more_than_a_gibibyte_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table has a row for each rollout, as wide as the longest: 3 x 5 x (1 + 1 + 1 + 3 + 3 + 4 +
    4) numbers of 16 bytes.
    """
    with serving(tiny_model("llama", seed=2)) as (one,):
        for least, status in ((4080, 200), (4079, 400)):
            monkeypatch.setattr(front, "LARGEST_TABLE", least)
            answer = httpx2.post(f"{url(one)}/score", content=request())
            assert answer.status_code == status
        assert "3 rollouts, the longest of 5 tokens" in answer.text and "a smaller k" in answer.text


DEEP = b'{"prompt": ' + b"[" * 10**5
BODIES: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "truths": ({"prompt": [True, 6]}, "Token id True is out of vocabulary"),
    "fractions": ({"prompt": [5.0, 6.0]}, "prompt must be token ids"),
    "negative": ({"prompt": [5, -6]}, "Token id -6 is out of vocabulary"),
    "huge": ({"prompt": [5, 10**40]}, f"Token id {10**40} is out of vocabulary"),
    "nested": ({"prompt": [[5, [6]]]}, "Token id [6] is out of vocabulary"),
    "mixed": ({"prompt": [5, [6]]}, "prompt must be token ids"),
    "rows that pad": (
        {"prompt": [5, 350]},
        "Token id 350 is out of vocabulary: the prompt may hold 0 to 319",
    ),
    "all of them everywhere": (
        {"prompt": [[5] * 999] * 99, "prompt_logprobs": 384},
        "98901 tokens with prompt_logprobs=384 are 37977984",
    ),
    "more than there are": (
        {"prompt": [5, 6], "prompt_logprobs": 385},
        "a whole number from 0 to 384",
    ),
    "a truth": ({"prompt": [5, 6], "prompt_logprobs": True}, "a whole number from 0 to 384"),
    "a fraction": ({"prompt": [5, 6], "prompt_logprobs": 1.0}, "a whole number from 0 to 384"),
    "a truth of tokens": ({"prompt": [5, 6], "max_tokens": True}, "this server writes nothing"),
    "a fraction of answers": ({"prompt": [5, 6], "n": 1.0}, "this server writes nothing"),
    "10^9 answers": ({"prompt": [5, 6], "n": 10**9}, "this server writes nothing"),
    "brackets": (DEEP, "the body is not JSON"),
    "digits": (b'{"prompt": [' + b"1" * 5000 + b"]}", "the body is not JSON"),
}


def test_completions_that_say_what_cannot_be() -> None:
    """The head has 384 rows and the tokenizer 320 tokens. What is good is answered as before."""
    with serving(tiny_model("llama", vocab_size=384, seed=2)) as (one,):
        where = f"{url(one)}/v1/completions"
        ask = {"max_tokens": 1, "prompt_logprobs": 2, "prompt": [5, 6, 7]}
        good = httpx2.post(where, json=ask).json()["choices"]
        for name, (body, words) in BODIES.items():
            answer = httpx2.post(
                where,
                content=body if isinstance(body, bytes) else json.dumps({**ask, **body}).encode(),
            )
            assert answer.status_code == 400 and words in answer.json()["error"]["message"], (
                name,
                answer.text,
            )
        assert httpx2.post(where, json=ask).json()["choices"] == good


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ("Content-Length: many", 400, "Content-Length: 'many' is no number"),
        ("Content-Length: -5", 400, "'-5' is no number"),
        ("Content-Length: 1e3", 400, "'1e3' is no number"),
        ("Content-Length: 1000", 400, "the body ends after 4 of the 1000 bytes"),
        ("Content-Length: 268435457", 413, "at most 268435456 bytes"),
        (f"Content-Length: {'9' * 5000}", 413, "at most 268435456 bytes"),
        ("Accept: */*", 413, "a request needs a Content-Length"),
    ],
)
def test_bodies_of_another_length_than_is_said(headers: str, status: int, words: str) -> None:
    with serving(tiny_model("llama")) as (one,):
        with socket.create_connection(one.server_address[:2], timeout=60) as raw:
            raw.sendall(
                f"POST /score HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\njunk".encode()
            )
            raw.shutdown(socket.SHUT_WR)
            # to the end: the connection is closed
            answer = b"".join(iter(lambda: raw.recv(1 << 16), b"")).decode()
        assert (
            answer.startswith(f"HTTP/1.1 {status} ")
            and words in json.loads(answer.partition("\r\n\r\n")[2])["error"]["message"]
        )
        assert Endpoint([url(one)], retries=0).get("/health") == {}


def test_prompts_wait_for_a_table_that_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 24 cells: 2 x 4 x 2, then 1 x 12 x 2, then 2 x 3 x 4.

    One that is more by itself is alone.
    """
    monkeypatch.setattr(front, "MOST_ENTRIES", 24)
    sizes = [(4, 2), (3, 0), (12, 2), (3, 4), (0, 0), (1, 4), (50, 1), (2, 2)]
    parts = [range(*part.indices(len(sizes))) for part in service._together(sizes)]
    assert parts == [range(2), range(2, 3), range(3, 5), range(5, 6), range(6, 7), range(7, 8)]
    assert list(service._together([])) == []


# ----------------------------------------------------------------------------------------- refusals


def test_other_tokenizers_and_other_weights_are_refused() -> None:
    words = ["completely different words of another language entirely"] * 3
    with serving(tiny_model("llama", seed=2), tiny_model("llama", seed=3)) as (one, two):
        with pytest.raises(
            UserError,
            match=r"tokenizer of the teacher's server is not the student's: the tokenizers .* "
            r"differ in",
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
        scorers = {
            "student": LocalModel(student, head_of(student)),
            "teacher": opened(NUMBERS, one),
        }
        with torch.no_grad():
            teacher.get_input_embeddings().weight[broken] = float("nan")
        with pytest.raises(
            UserError,
            match=r"^rollouts 0/0/0, 0/1/0 at T .*not finite for rollout 0/1/0: .*Nothing was "
            r"learnt from this step",
        ):
            gather(rows, Needs(frozenset(NUMBERS)), scorers)


def test_a_body_cut_short_is_broken_not_believed() -> None:
    body = protocol.pack({"x": torch.arange(3)}, {"a": 1})
    tensors, settings = protocol.unpack(body)
    assert tensors["x"].tolist() == [0, 1, 2] and settings == {"a": 1}
    for cut_short in (body[:-1], body[:20], b""):
        with pytest.raises(ValueError, match="not a safetensors body"):
            protocol.unpack(cut_short)


# ------------------------------------------------------------------------------------- command line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP], ids=["term", "hup"])
def ending(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal as a program finds it, whatever runs these tests."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def test_the_command_serves_until_it_is_told_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ending: int
) -> None:
    """A signal while a request is under way: it is answered, and the exit code is 0."""
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
        return client.post(
            "/v1/completions", {"prompt": [5, 6], "max_tokens": 0, "prompt_logprobs": 0}
        )

    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(visit)
        pool.submit(lambda: entered.wait(10) and os.kill(os.getpid(), ending))
        assert main(["serve-teacher", model, "--port", str(port), "--name", "big"]) == 0
    assert list(answer.result()["choices"][0]["prompt_logprobs"][1]) == ["6"]
    out = capsys.readouterr().out
    assert f"serving big (float32, cpu) at http://127.0.0.1:{port}" in out and out.endswith(
        "stopped\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "whoever reaches it can read the model's head and use the machine"),
        (["--max-batch-tokens", "0"], "max_batch_tokens=0 must be at least 1"),
    ],
)
def test_settings_that_will_not_do(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve-teacher", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_port_in_use() -> None:
    with (
        serving(tiny_model("llama")) as (one,),
        pytest.raises(
            UserError, match=r"cannot listen on 127\.0\.0\.1:.* choose another with --port"
        ),
    ):
        make_server(tiny_model("llama"), tiny_tokenizer(), "T", port=one.server_address[1])


def test_a_method_that_needs_the_whole_vocabulary_gets_it() -> None:
    with serving(tiny_model("llama", seed=2)) as (one,):
        assert isinstance(opened((VocabularyFact("teacher"),), one), client_serve.HiddenStates)
        assert isinstance(opened((LogpFact("teacher"),), one), client_serve.Numbers)
