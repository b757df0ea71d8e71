"""The sampler's side of the talk with `vllm serve`: the server is played by a copy of the student
that takes weights as vLLM's workers do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.sampling import HFSampler
from opdkit.sampling.server import ServerSampler, ServerSettings
from opdkit.types import Prompt, Sampling
from tests.common.fake_sampler import PAUSE, RESET, RESUME, Vllm
from tests.common.fake_server import FakeServer, Fault
from tests.common.rounding import FORWARD
from tests.common.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    Prompt(f"p{i}", TOKENIZER(text)["input_ids"], {}, [30] * i)
    for i, text in enumerate(["So", "What is 12 plus 30?", "user"])
]
GREEDY = Sampling(temperature=0, max_completion_length=8)


@pytest.fixture
def student() -> Any:
    return tiny_model(seed=1)


@pytest.fixture
def servers() -> Iterator[list[Vllm]]:
    """Two, with other weights than the student's."""
    with ExitStack() as stack:
        yield [stack.enter_context(Vllm(tiny_model(seed=9), TOKENIZER)) for _ in range(2)]


def connect(student: Any, servers: list[Vllm], **settings: Any) -> ServerSampler:
    return ServerSampler(
        student, TOKENIZER, ServerSettings(tuple(s.url for s in servers), retries=0, **settings)
    )


def test_every_server_has_the_weights_before_the_first_rollout(
    student: Any, servers: list[Vllm]
) -> None:
    sampler = connect(student, servers)
    rollouts, theirs = (
        sampler.sample(PROMPTS, GREEDY),
        HFSampler(student, TOKENIZER).sample(PROMPTS, GREEDY),
    )
    assert [(r.id, r.tokens, r.text, r.finish, r.marks) for r in rollouts] == [
        (r.id, r.tokens, r.text, r.finish, r.marks) for r in theirs
    ]
    for a, b in zip(rollouts, theirs):
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=FORWARD, rtol=0)
    for server in servers:
        assert [path for path, _ in server.calls] == [PAUSE, "/collective_rpc", RESET, RESUME]
    assert sampler.version == 0 and list(sampler.folder.iterdir()) == []


def test_after_a_step_they_have_the_new_ones(student: Any, servers: list[Vllm]) -> None:
    sampler = connect(student, servers)
    sampler.sync(student, 0)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.add_(0.1)
    sampler.sync(student, 1)
    for server in servers:
        assert torch.equal(
            server.model.model.layers[0].mlp.up_proj.weight,
            student.model.layers[0].mlp.up_proj.weight,
        )


def test_requests_hold_token_ids_and_leave_nothing_to_the_checkpoint(
    student: Any, servers: list[Vllm]
) -> None:
    connect(student, servers[:1]).sample(PROMPTS, GREEDY)
    asked = sorted(
        (r for r in servers[0].requests if "return_token_ids" in r), key=lambda r: len(r["prompt"])
    )
    assert [r["prompt"] for r in asked] == sorted((p.tokens + p.prefix for p in PROMPTS), key=len)
    neutral = {
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    assert all(neutral.items() <= r.items() for r in asked)


def test_one_that_does_not_take_them_stops_the_run(student: Any, servers: list[Vllm]) -> None:
    servers[1].deaf = True
    with pytest.raises(UserError, match=f"sending weights to {servers[1].url}.*not the student's"):
        connect(student, servers).sample(PROMPTS, GREEDY)


def test_one_that_others_use_too_is_refused(student: Any, servers: list[Vllm]) -> None:
    servers[0].busy = True
    with pytest.raises(UserError, match="its prefix cache"):
        connect(student, servers).sync(student, 0)


def test_one_that_returns_texts_is_refused(student: Any, servers: list[Vllm]) -> None:
    servers[0].ids = False
    with pytest.raises(UserError, match="never encodes a text again"):
        connect(student, servers[:1]).sample(PROMPTS, GREEDY)


NUMBERS = {"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -2.5]}}


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        ({"token_ids": [5, 320]}, "token 320 is none of the student's 320"),
        ({"token_ids": [5, -1]}, "token -1 is none"),
        ({"token_ids": [5, 6.0]}, "token 6.0 is none"),
        ({"token_ids": [5, True]}, "token True is none"),
        ({"token_ids": [5]}, "1 tokens and 2 log-probs"),
        ({"token_ids": [5] * 9, "logprobs": {"token_logprobs": [-1.5] * 9}}, "of at most 8"),
        ({"logprobs": {"token_logprobs": [-1.5, 2.5]}}, "a log-prob of 2.5"),
        ({"logprobs": {"token_logprobs": [-1, -2]}}, "-1 stands for a log-prob"),
        ({"logprobs": {"token_logprobs": ["-1.5", "-2.5"]}}, "-1.5 stands for a log-prob"),
        ({"logprobs": [1]}, "AttributeError"),
        ({"prompt_token_ids": [1, 2, 3]}, "an answer to another prompt"),
    ],
)
def test_a_completion_that_is_none_names_its_rollout(
    student: Any, servers: list[Vllm], spoilt: dict[str, Any], words: str
) -> None:
    sampler = connect(student, servers[:1])
    sampler.sample(PROMPTS[:1], GREEDY, policy_version=0, seed=0)
    servers[0].spoilt = NUMBERS | spoilt
    with pytest.raises(UserError, match=r"^rollout .* at student: .*127\.0\.0\.1") as caught:
        sampler.sample(PROMPTS[:1], GREEDY, policy_version=0, seed=1)
    assert words in str(caught.value)


def test_a_server_that_lost_the_weights_between_two_answers(
    student: Any, servers: list[Vllm]
) -> None:
    """It closes a connection, and is back with the weights that it was started with."""
    sampler = ServerSampler(student, TOKENIZER, ServerSettings((servers[0].url,), retries=2))
    sampler.servers.endpoint.sleep = lambda seconds: None
    sampler.sample(PROMPTS[:1], GREEDY, policy_version=0, seed=0)
    servers[0].faults = [Fault("close", at=servers[0].scored + 1)]
    sampler.sample(PROMPTS[:1], GREEDY, policy_version=0, seed=1)  # back with the same
    servers[0].faults = [Fault("close", at=servers[0].scored + 1)]
    servers[0].model = tiny_model(seed=9)
    with pytest.raises(UserError, match="it was started again, and lost them"):
        sampler.sample(PROMPTS[:1], GREEDY, policy_version=0, seed=2)


def test_log_probs_of_the_plain_softmax_do_not_do_where_the_draw_is_cut(
    student: Any, servers: list[Vllm]
) -> None:
    sampler = connect(student, servers)
    sampler.sample(PROMPTS, Sampling(max_completion_length=4))
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        sampler.sample(PROMPTS, Sampling(max_completion_length=4, temperature=0.7))


def test_a_padded_head_is_cut_first(servers: list[Vllm]) -> None:
    padded = tiny_model(vocab_size=352)
    for server in servers:
        server.model = tiny_model(vocab_size=352, seed=9)
    with pytest.raises(UserError, match="not the student's"):  # these know no cut
        connect(padded, servers).sync(padded, 0)
    for server in servers:
        told = [body for path, body in server.calls if path == "/collective_rpc"]
        assert told[0] == {"method": "opdkit_head", "args": [320]}
        assert told[1]["method"] == "opdkit_load_folder"


def test_adapters_are_loaded_under_a_new_name_each_time(
    student: Any, servers: list[Vllm], tmp_path: Path
) -> None:
    from opdkit.train.settings import Lora
    from opdkit.train.student import with_adapters

    server = servers[0]
    server.model = copy.deepcopy(student)
    model = with_adapters(student, Lora(r=2)).eval()  # which change nothing at the start
    sampler = connect(model, servers[:1], enable_lora=True, shared_folder=str(tmp_path))
    for version in range(2):
        sampler.sync(model, version)
    names = [f"student-{sampler.run}-{version}" for version in range(2)]
    loaded = [body for path, body in server.calls if path == "/v1/load_lora_adapter"]
    assert [b["lora_name"] for b in loaded] == names and all(
        b["lora_path"].startswith(str(tmp_path)) for b in loaded
    )
    assert [body for path, body in server.calls if path == "/v1/unload_lora_adapter"] == [
        {"lora_name": names[0]}
    ]
    assert sampler.servers.name == names[1] and list(tmp_path.iterdir()) == []


def test_how_a_server_must_be_started_is_said(student: Any) -> None:
    with (
        FakeServer(tiny_model(), TOKENIZER) as plain,
        pytest.raises(UserError, match=r"(?s)404.*VLLM_SERVER_DEV_MODE=1 vllm serve MODEL"),
    ):
        ServerSampler(student, TOKENIZER, ServerSettings((plain.url,))).sync(student, 0)


def test_what_is_not_known_of_a_server(student: Any, servers: list[Vllm]) -> None:
    with pytest.raises(UserError, match="does not serve 'other' but student"):
        connect(student, servers, model="other")
    servers[1].name = "another"
    with pytest.raises(UserError, match="serve different models"):
        connect(student, servers)
    servers[1].max_model_len = None
    with pytest.raises(UserError, match="max_model_len in /v1/models"):
        connect(student, servers[1:])


def test_files_reach_another_machine_through_a_shared_folder_only(
    student: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meet = "opdkit.sampling.servers.Servers._meet"
    monkeypatch.setattr(meet, lambda servers, model: ("student", 4096))
    with pytest.raises(UserError, match=r"gpu7 is another machine.*shared_folder"):
        ServerSampler(
            student, TOKENIZER, ServerSettings(("http://127.0.0.1:1", "http://gpu7:8000"))
        )
    made = ServerSampler(
        student,
        TOKENIZER,
        ServerSettings(("http://gpu7:8000",), shared_folder=str(tmp_path / "new")),
    )
    assert made.folder == tmp_path / "new" and made.folder.is_dir()


@pytest.mark.parametrize(
    "wrong",
    [{"urls": ()}, {"concurrency": 0}, {"timeout": 0}, {"retries": -1}, {"dtype": "float64"}],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("s")):
        ServerSettings(**({"urls": ("http://127.0.0.1:1",)} | wrong))
