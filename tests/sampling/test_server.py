"""The sampler's side of the talk with `vllm serve`: the server is played by a copy of the student
that takes weights as vLLM's workers do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.models.engines.vllm_worker import _read
from opdkit.sampling import HFSampler
from opdkit.sampling.server import ServerSampler, ServerSettings
from opdkit.types import Prompt, Sampling
from tests.common.fake_server import Answer, FakeServer, Fault
from tests.common.rounding import FORWARD
from tests.common.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    Prompt(f"p{i}", TOKENIZER(text)["input_ids"], {}, [30] * i)
    for i, text in enumerate(["So", "What is 12 plus 30?", "user"])
]
GREEDY = Sampling(temperature=0, max_completion_length=8)


@dataclass
class Vllm(FakeServer):
    """Draws the most probable token whatever is asked, and notes what changes it."""

    name: str = "student"
    calls: list[Any] = field(default_factory=list)  # path and body of what is no completion
    busy: bool = False  # its prefix cache cannot be reset
    deaf: bool = False  # weights are acknowledged and not taken
    ids: bool = True  # token ids are returned
    spoilt: dict[str, Any] = field(default_factory=dict)  # of a completion, in place of its own

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions" and "prompt_logprobs" not in body:
            return self.draw(body)
        if path in ("/v1/completions", "/v1/models"):
            return super().answer(path, body)
        self.calls.append((path, body))
        if path == "/reset_prefix_cache":
            return {"success": not self.busy}
        if path == "/collective_rpc" and body["method"] == "opdkit_load_folder" and not self.deaf:
            self.model.load_state_dict(dict(_read(Path(body["args"][0]))), strict=False)
        if path not in ("/collective_rpc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            raise Answer(404, "Not Found")
        if path == "/v1/load_lora_adapter":
            self.name = body["lora_name"]
        return {"results": [0]}

    def draw(self, body: dict[str, Any]) -> Any:
        self.check(body["prompt"], body["model"])
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < body["max_tokens"] and not (
            tokens and tokens[-1] in body.get("stop_token_ids", ())
        ):
            row = self.logps([*body["prompt"], *tokens, 0])[-1]
            tokens.append(int(row.argmax()))
            logps.append(float(row.max()))
        ended = "stop" if tokens[-1] in body.get("stop_token_ids", ()) else "length"
        choice = {"index": 0, "finish_reason": ended, "logprobs": {"token_logprobs": logps}}
        return {
            "model": self.name,
            "choices": [
                choice | ({"token_ids": tokens} if self.ids else {"text": "x"}) | self.spoilt
            ],
        }


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
        assert [path for path, _ in server.calls] == ["/collective_rpc", "/reset_prefix_cache"]
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
    sampler.endpoint.sleep = lambda seconds: None
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
    connect(padded, servers)
    assert [call for server in servers for call in server.calls] == [
        ("/collective_rpc", {"method": "opdkit_head", "args": [320]})
    ] * 2


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
    assert sampler.name == names[1] and list(tmp_path.iterdir()) == []


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
    monkeypatch.setattr("opdkit.sampling.server._served", lambda endpoint, model: ("student", 4096))
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
