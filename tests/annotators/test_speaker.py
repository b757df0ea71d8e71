"""Who writes text: the student as it is, a model that may be the teacher's own, and a server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.annotators import AnnotatorContext
from opdkit.annotators.speaker import (
    ModelSpeaker,
    Question,
    ServerSpeaker,
    needed,
    open_speaker,
    user,
    writer_of,
)
from opdkit.methods.method import load
from opdkit.models.engines import endpoint
from opdkit.sampling import HFSampler
from opdkit.sampling.respond import seed_of
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.kinds import teacher_of
from opdkit.types import Sampling
from tests.common.fake_server import Answer, FakeServer
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer

SAMPLING = Sampling(max_completion_length=6)
ASKED = [Question(f"q{i}", user(f"What is {i} plus 30?")) for i in range(3)]


@pytest.fixture
def context() -> AnnotatorContext:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    teachers = TeacherContext(load("opd"), tokenizer)
    return AnnotatorContext(teachers, HFSampler(model, tokenizer), 4096)


def test_answers_depend_on_the_seed_and_the_id_alone(context: AnnotatorContext) -> None:
    """Neither on the order nor on who else is asked, nor on draws before."""
    speaker = open_speaker("student", context, "x")
    said = speaker.say(ASKED, SAMPLING, seed=1)
    torch.rand(3)
    assert speaker.say(ASKED[::-1], SAMPLING, seed=1) == said[::-1]
    assert speaker.say(ASKED[1:2], SAMPLING, seed=1) == said[1:2]
    assert speaker.say(ASKED, SAMPLING, seed=2) != said
    assert len({one.text for one in said}) > 1 and not any(one.why for one in said)
    assert speaker.say([], SAMPLING, seed=1) == []


def test_the_student_speaks_as_it_is_now(context: AnnotatorContext) -> None:
    greedy = replace(SAMPLING, temperature=0.0)
    speaker = open_speaker("student", context, "x")
    before = speaker.say(ASKED, greedy, 0)
    student: Any = context.student
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assert speaker.say(ASKED, greedy, 0) != before


def test_a_question_that_does_not_fit_is_not_cut(context: AnnotatorContext) -> None:
    long = Question("long", user("12 " * 200))
    speaker = open_speaker("student", replace(context, reads=100), "x")
    short, none = speaker.say([ASKED[0], long], SAMPLING, 0)
    assert short.text and not none.text and "more than the 100 tokens" in none.why
    assert short == speaker.say(ASKED[:1], SAMPLING, 0)[0]
    with pytest.raises(UserError, match="y wrote nothing: the question"):
        needed([short, none], "y")


def test_a_model_is_loaded_once_and_shared_with_a_teacher(
    context: AnnotatorContext, tmp_path: Path
) -> None:
    """By its name, or by the name that the run has for it; it says what a sampler of it says."""
    name = save_tiny(tmp_path / "model", seed=5)
    local: Any = teacher_of(name).open(context.teachers)
    context = replace(context, models={"teacher_1": name, "teacher": name})
    speakers = [open_speaker(spec, context, "x") for spec in (name, "teacher_1", "teacher")]
    for speaker in speakers:
        assert isinstance(speaker, ModelSpeaker) and speaker.model.model is local.model
    said = [speaker.say(ASKED, SAMPLING, 0) for speaker in speakers]
    assert said[0] == said[1] == said[2]
    assert said[0] != open_speaker("student", context, "x").say(ASKED, SAMPLING, 0)


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    context = AnnotatorContext(
        TeacherContext(load("opd"), tokenizer), HFSampler(tiny_model(), tokenizer)
    )
    speaker = open_speaker("student", context, "x")
    assert isinstance(speaker, ModelSpeaker)
    [prompt] = speaker._prompts(ASKED[:1])
    assert tokenizer.decode(prompt.tokens) == "user: What is 0 plus 30?\n\nassistant:"
    assert speaker.say(ASKED[:1], SAMPLING, 0)[0].text


@dataclass
class Chat(FakeServer):
    """Chat completions whose words name what was asked."""

    model: Any = None
    tokenizer: Any = None
    name: str = "one"
    fails: str = "never"

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": self.name}]}
        said = body["messages"][0]["content"]
        if self.fails in said:
            raise Answer(400, "too long for me")
        text = f"<think>hm</think>{body['seed']} {body['max_tokens']} {said}"
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def test_a_server_is_asked_in_chat_completions(
    context: AnnotatorContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With seeds keyed as rollouts' are; one that it refuses has no text, and the others do."""
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    with Chat(fails="1 plus") as server:
        for spec in (f"server:{server.url}", {"kind": "server", "urls": [server.url]}):
            speaker = open_speaker(spec, context, "x")
            assert isinstance(speaker, ServerSpeaker)
            said = speaker.say(ASKED, SAMPLING, 3)
            assert said[0].text == f"{seed_of(3, 'q0')} 6 What is 0 plus 30?"
            assert said[2].text and not said[1].text and "too long for me" in said[1].why
        with pytest.raises(UserError, match="the teacher's server has one: there is no 'two'"):
            open_speaker({"kind": "server", "urls": [server.url], "model": "two"}, context, "x")


def test_who_only_scores_is_refused_without_loading_anything() -> None:
    with pytest.raises(UserError, match=r"x='cached:folder' is a cached teacher, which scores"):
        writer_of("cached:folder", {}, "x")
    mixed = {"kind": "mixture", "of": {"a": "m", "b": "n"}}
    with pytest.raises(UserError, match="is a mixture teacher"):
        writer_of("both", {"both": mixed}, "x")
    assert writer_of("student", {}, "x") is None
