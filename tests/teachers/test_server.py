"""Teachers behind vLLM's and SGLang's HTTP: their numbers are the model's own, and whatever is
wrong with a server is said at the start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.models.body import head_of
from opdkit.models.layout import Layout
from opdkit.objective.divergences import ReverseKL
from opdkit.objective.facts import (
    EntropyFact,
    Fact,
    GapFact,
    LogpAtFact,
    LogpFact,
    TopFact,
    VocabularyFact,
)
from opdkit.objective.head import flat_positions
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel, RoutedRemote, vllm_sglang
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.server import ServerTeacher
from opdkit.train.gather import collate, gather
from opdkit.types import Rollout
from tests.common.fake_server import FakeServer, Fault
from tests.common.rounding import FORWARD
from tests.common.tiny import tiny_model, tiny_tokenizer
from tests.train.rows import rollouts

OWN: tuple[Fact, ...] = (
    LogpFact("teacher"),
    TopFact("teacher", 3),
    LogpAtFact("teacher", "teacher", 3),
)
AT = LogpAtFact("teacher", "student", 4)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        "student": tiny_model("qwen3", seed=1),
        "teacher": tiny_model("llama", seed=2),
        "other": tiny_model("llama", seed=3),
    }


def method(*facts: Fact) -> Any:
    return SimpleNamespace(needs=Needs(frozenset(facts)), name="mine")


def opened(tokenizer: Any, *urls: str, facts: tuple[Fact, ...] = OWN, **settings: Any) -> Any:
    teacher = ServerTeacher(urls, **{"retries": 0, **settings})
    return teacher.open(TeacherContext(method(*facts), tokenizer))


def rows() -> list[Rollout]:
    """Ragged; one is empty, and of one a token in the middle is not trained."""
    made = rollouts()
    return [*made[:2], replace(made[2], trained=[True] * 3 + [False] * 2 + [True] * 3), *made[3:]]


def facts_of(models: dict[str, Any], teacher: Any, facts: tuple[Fact, ...]) -> Any:
    student = LocalModel(models["student"], head_of(models["student"]))
    return gather(rows(), Needs(frozenset(facts)), {"student": student, "teacher": teacher})


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_numbers_are_those_of_a_teacher_in_this_process(
    kind: str, models: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the student's most probable ids, which SGLang is asked about in spans of tokens."""
    monkeypatch.setattr(vllm_sglang, "SPAN", 3)
    with (
        FakeServer(models["teacher"], tokenizer, kind, at_ids=True) as one,
        FakeServer(models["teacher"], tokenizer, kind, at_ids=True) as two,
    ):
        served = opened(tokenizer, one.url, two.url, facts=(*OWN, AT))
        probed = len(one.requests), len(two.requests)
        given = facts_of(models, served, (*OWN, AT))
        assert len(one.requests) > probed[0] and len(two.requests) > probed[1]
    expected = facts_of(
        models, LocalModel(models["teacher"], head_of(models["teacher"])), (*OWN, AT)
    )
    for fact in (*OWN, AT):
        torch.testing.assert_close(given.read(fact), expected.read(fact), rtol=0, atol=FORWARD)
    assert (
        given["teacher"].logp[3].abs().sum() == 0 and given["teacher"].logp[2, 3:5].abs().sum() == 0
    )


def test_positions_in_any_order_and_none(models: dict[str, Any], tokenizer: Any) -> None:
    with FakeServer(models["teacher"], tokenizer) as fake:
        served = opened(tokenizer, fake.url)
        layout = Layout(rows(), 8)
        positions = flat_positions(collate(rows(), "cpu", torch.float32).mask)
        straight = served.facts(OWN, layout, positions, {})
        turned = served.facts(OWN, layout, positions.flip(0), {})
        for fact in OWN:
            assert torch.equal(turned[fact], straight[fact].flip(0))
        sent = len(fake.requests)
        nothing = served.facts(OWN, layout, positions[:0], {})
        assert [tuple(nothing[fact].shape) for fact in OWN] == [(0,), (0, 3), (0, 3)] and len(
            fake.requests
        ) == sent


def test_the_tokens_sent_are_the_rollouts_own_up_to_the_last_one_asked_about(
    models: dict[str, Any], tokenizer: Any
) -> None:
    with FakeServer(models["teacher"], tokenizer) as fake:
        served = opened(tokenizer, fake.url, facts=(LogpFact("teacher"),))
        fake.requests.clear()
        (rollout,) = rollouts(lengths=((3, 5),))
        served.facts([LogpFact("teacher")], Layout([rollout], 5), torch.tensor([1, 3]), {})
    sent, probe = [(r["prompt"], r["prompt_logprobs"]) for r in fake.requests]
    assert sent == (rollout.prompt + rollout.tokens[:4], 0)
    assert probe == (
        served.inner.probed[0].ask.tokens,
        0,
    )  # it is the server that it was at the start


def test_routed_with_a_teacher_in_this_process(models: dict[str, Any], tokenizer: Any) -> None:
    local = LocalModel(models["other"], head_of(models["other"]))
    named = [
        replace(r, row={"teacher": name}) for r, name in zip(rollouts(), ("a", "b", "a", "b", "b"))
    ]
    needs = Needs(frozenset(OWN))
    with FakeServer(models["teacher"], tokenizer) as fake:
        routed = RoutedRemote({"a": opened(tokenizer, fake.url), "b": local})
        given = gather(named, needs, {"teacher": routed})
    for b, scorer in enumerate((models["teacher"], models["other"], models["teacher"])):
        alone = gather(named, needs, {"teacher": LocalModel(scorer, head_of(scorer))})
        for fact in OWN:
            torch.testing.assert_close(
                given.read(fact)[b], alone.read(fact)[b], rtol=0, atol=FORWARD
            )


# ------------------------------------------------------------------------------------- at the start


@dataclass
class Case:
    """A server that is not what the run needs, and what is said about it."""

    words: list[str]
    fake: dict[str, Any]
    facts: tuple[Fact, ...] = OWN
    settings: dict[str, Any] | None = None


CASES = {
    "too few log-probs": Case(
        [
            "64 log-probs per token were asked for",
            "returns at most 20",
            "--max-logprobs 64",
            "k=20",
        ],
        {},
        (LogpAtFact("teacher", "teacher", 64), TopFact("teacher", 64)),
    ),
    "another model": Case(
        ["does not serve 'mine' but teacher", "set teacher.model"], {}, settings={"model": "mine"}
    ),
    "a smaller vocabulary": Case(
        ["does not know a token of the student", "Token id 319 is out of vocabulary"],
        {"small": True},
    ),
    "another tokenizer": Case(
        ["the tokenizer of http://127.0.0.1", "token ", "teacher of the student's family"],
        {"words": True},
    ),
    "another tokenizer, SGLang": Case(
        ["the tokenizer of http://127.0.0.1", "is '"], {"words": True, "kind": "sglang"}
    ),
    "a short context": Case(
        ["cannot read so many tokens", "maximum context length is 16", "--max-model-len"],
        {"max_model_len": 16},
    ),
    "entropy": Case(
        ["method 'mine' reads teacher entropy", "a vLLM server", "opdkit serve-teacher"],
        {},
        (EntropyFact("teacher"),),
    ),
    "the whole vocabulary": Case(
        ["teacher over the whole vocabulary", "a SGLang server cannot say"],
        {"kind": "sglang"},
        (VocabularyFact("teacher"),),
    ),
    "a divergence": Case(
        ["over the whole vocabulary", "cannot say"],
        {},
        (GapFact(ReverseKL(), "student", "teacher"),),
    ),
    "ids of the student": Case(
        ["log-probs at the student's top 4", "requires the V2 model runner", "serve-teacher"],
        {},
        (*OWN, AT),
    ),
    "not a number": Case(
        ["the first request to http", "no log-probs", "nan"], {"faults": [Fault("nan")]}
    ),
    "one token early": Case(
        ["the first request to http", "do not hold its own id"], {"faults": [Fault("shifted")]}
    ),
    "a token missing": Case(
        ["log-probs of ", "tokens were asked for, and "], {"faults": [Fault("short")]}
    ),
    "ill": Case(
        ["does not answer POST /v1/completions", "500 out of memory"],
        {"faults": [Fault("500", times=0)]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_server_that_will_not_do_is_refused_before_training(
    name: str, models: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    settings = dict(case.fake)
    model = (
        tiny_model("llama", vocab_size=300) if settings.pop("small", False) else models["teacher"]
    )
    theirs = (
        tiny_tokenizer(["completely different words of another language entirely"] * 3)
        if settings.pop("words", False)
        else tokenizer
    )
    with FakeServer(model, theirs, **settings) as fake, pytest.raises(UserError) as caught:
        opened(tokenizer, fake.url, facts=case.facts, **(case.settings or {}))
    assert [word for word in case.words if word not in str(caught.value)] == [], str(caught.value)


def test_nobody_there(tokenizer: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"^the teacher's server does not answer GET /v1/models, tried once: "
        r"http://127.0.0.1:9: ConnectError",
    ):
        opened(tokenizer, "http://127.0.0.1:9")


def test_one_of_several_may_be_down_for_now(
    models: dict[str, Any], tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(models["teacher"], tokenizer) as fake:
        served = opened(tokenizer, "http://127.0.0.1:9", fake.url)
        assert "The others go on without it" in capsys.readouterr().err
        assert served.facts(OWN, Layout(rows(), 8), torch.tensor([0]), {})[OWN[0]].shape == (1,)


def test_two_servers_with_different_weights_under_one_name(
    models: dict[str, Any], tokenizer: Any
) -> None:
    with (
        FakeServer(models["teacher"], tokenizer) as one,
        FakeServer(models["other"], tokenizer) as two,
    ):
        with pytest.raises(
            UserError, match=r"both serve 'teacher' and do not agree: .* differ by \d\.\d\d nats"
        ):
            opened(tokenizer, one.url, two.url)
        two.name = "poet"
        with pytest.raises(
            UserError,
            match=r"serve different models \(poet, teacher\): say which is meant with "
            r"teacher.model=NAME",
        ):
            opened(tokenizer, one.url, two.url)
        two.name, two.kind = one.name, "sglang"
        with pytest.raises(
            UserError, match="some of the teacher's servers are vLLM and some SGLang"
        ):
            opened(tokenizer, one.url, two.url)


def test_a_tokenizer_that_cannot_be_compared_is_said(
    models: dict[str, Any],
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_sglang.Vllm, "texts", lambda *_: {})
    with FakeServer(models["teacher"], tokenizer) as fake:
        opened(tokenizer, fake.url)
        assert f"{fake.url} does not say its tokens' texts" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- in a step


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", "are no log-probs"),
        ("null", "are no log-probs"),
        ("shifted", "do not hold its own id"),
        ("short", "log-probs of 8 tokens were asked for, and 7 came back"),
        ("other", "the answer is the model 'somebody else''s, not 'teacher''s"),
    ],
)
def test_a_broken_answer_names_its_rollout(
    fault: str, words: str, models: dict[str, Any], tokenizer: Any
) -> None:
    with FakeServer(models["teacher"], tokenizer) as fake:
        served = opened(tokenizer, fake.url, concurrency=1)
        fake.faults = [Fault(fault, at=fake.scored + 1)]
        with pytest.raises(UserError, match=r"^rollout 0/0/0 at teacher \(http://127") as caught:
            facts_of(models, served, OWN)
    assert words in str(caught.value), str(caught.value)


def test_a_rollout_that_does_not_fit_is_not_cut(models: dict[str, Any], tokenizer: Any) -> None:
    """A context of 61 tokens holds 60 and the one that vLLM insists on writing."""
    with FakeServer(models["teacher"], tokenizer, max_model_len=61) as fake:
        served = opened(tokenizer, fake.url)
        (fits,) = rollouts(lengths=((30, 30),))
        assert served.facts(OWN, Layout([fits], 30), torch.tensor([29]), {})[OWN[0]].shape == (1,)
        (long,) = rollouts(lengths=((30, 31),))
        with pytest.raises(
            UserError,
            match=r"61 tokens and one more do not fit the server's context of 61. Nothing is cut",
        ):
            served.facts(OWN, Layout([long], 31), torch.tensor([30]), {})


def test_a_most_probable_token_that_the_tokenizer_does_not_have(
    models: dict[str, Any], tokenizer: Any
) -> None:
    """A row that only pads the teacher's head."""
    with FakeServer(models["teacher"], tokenizer) as fake:
        served = replace(opened(tokenizer, fake.url).inner, tokens=3)
        with pytest.raises(UserError, match="a padded row of the teacher's head"):
            facts_of(models, served, OWN)
