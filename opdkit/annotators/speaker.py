"""Who writes text for an annotator: the student, a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from opdkit.annotators.settings import AnnotatorContext
from opdkit.base.errors import UserError
from opdkit.data.messages import Message
from opdkit.data.prompts import Prompts
from opdkit.models.chat import has_template
from opdkit.models.engines.chat import ChatServer
from opdkit.models.tokenizers import real_vocabulary
from opdkit.rewards.extract import after_thinking
from opdkit.sampling import HFSampler
from opdkit.sampling.respond import seed_of
from opdkit.teachers.kinds import one_teacher_of
from opdkit.teachers.speech import VoiceHere
from opdkit.teachers.teacher import Teacher
from opdkit.types import Prompt, Sampler, Sampling

STUDENT = "student"


@dataclass(frozen=True)
class Question:
    """Messages to be answered.

    Arguments:
        id: keys the draws, with the seed.
        plain: what a model without a chat template continues; None: the messages with their roles.
    """

    id: str
    messages: tuple[Message, ...]
    plain: str | None = None


@dataclass(frozen=True)
class Said:
    """An answer without its thoughts; "" where there is none, and why."""

    text: str
    why: str = ""


class Speaker(Protocol):
    """Someone who answers messages."""

    def say(self, questions: Sequence[Question], sampling: Sampling, seed: int) -> list[Said]:
        """An answer to each; in this process the same again for the same weights, seed and ids."""
        ...


def user(text: str) -> tuple[Message, ...]:
    """One message of a person: the form that every chat template can write."""
    return ({"role": "user", "content": text},)


def needed(said: Sequence[Said], who: str) -> list[str]:
    """The texts, where each of them is needed."""
    for one in said:
        if one.why:
            raise UserError(f"{who} wrote nothing: {one.why}")
    return [one.text for one in said]


# --------------------------------------------------------------------------------------- who speaks


@dataclass(frozen=True)
class ModelSpeaker:
    """A model that the run samples: the student, or a frozen one.

    model: what its passes stand in (`local.LocalModel`), None where it is sampled elsewhere.
    options: of its chat template.
    """

    sampler: Sampler
    tokenizer: Any
    reads: int | None  # tokens of its context; None: no limit is known
    options: Mapping[str, Any]
    model: Any = None

    def say(self, questions: Sequence[Question], sampling: Sampling, seed: int) -> list[Said]:
        prompts = self._prompts(questions)
        room = None if self.reads is None else self.reads - sampling.max_completion_length
        fits = [p for p in prompts if room is None or len(p.tokens) <= room]
        sampling = replace(sampling, num_generations=1)
        if self.model is None:
            made = self.sampler.sample(fits, sampling, seed=seed, step=None)
        else:
            with self.model.writing():
                made = self.sampler.sample(fits, sampling, seed=seed, step=None)
        said = {prompt.id: _answer(r.text) for prompt, r in zip(fits, made, strict=True)}
        long = (
            f"the question and {sampling.max_completion_length} tokens for the answer are more "
            f"than the {self.reads} tokens that the model reads. Set a lower max_tokens, or use "
            "shorter prompts"
        )
        return [said.get(p.id, Said("", long)) for p in prompts]

    def _prompts(self, questions: Sequence[Question]) -> Sequence[Prompt]:
        if not questions:
            return []
        chat = has_template(self.tokenizer)
        rows = [
            {"id": q.id, "prompt": [dict(m) for m in q.messages] if chat else _plain(q)}
            for q in questions
        ]
        thinking = self.options.get("enable_thinking") if chat else None
        return Prompts(rows, self.tokenizer, chat=chat, enable_thinking=thinking)


def _plain(question: Question) -> str:
    """A conversation for a model without a chat template."""
    if question.plain is not None:
        return question.plain
    said = [f"{m['role']}: {m['content']}" for m in question.messages]
    return "\n\n".join([*said, "assistant:"])


def _answer(text: str) -> Said:
    said = after_thinking(text)
    return Said(said, "" if said else "the answer is empty, its thoughts aside")


@dataclass(frozen=True)
class ServerSpeaker:
    """A model behind chat completions."""

    server: ChatServer

    def say(self, questions: Sequence[Question], sampling: Sampling, seed: int) -> list[Said]:
        calls = [partial(self._one, question, sampling, seed) for question in questions]
        return list(self.server.endpoint.map(calls)) if calls else []

    def _one(self, question: Question, sampling: Sampling, seed: int) -> Said:
        settings: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_completion_length,
            "seed": seed_of(seed, question.id),
        }
        try:
            return _answer(self.server.say(question.messages, settings, question.id)[0])
        except UserError as error:
            return Said("", str(error))


# ---------------------------------------------------------------------------------------- by a name


def writer_of(spec: Any, models: Mapping[str, Any], where: str) -> Teacher | None:
    """Who a setting names: a model of the run by its name, else a model or server in the words of a
    run's `teacher`; None: the student. Refused where it cannot write.
    """
    if spec == STUDENT:
        return None
    named = isinstance(spec, str) and spec in models
    one = one_teacher_of(models[spec] if named else spec, f"models.{spec}" if named else where)
    if not one.writes:
        raise UserError(
            f"{where}={spec!r} is a {one.kind} teacher, which scores and cannot write text: name "
            "the student, a model (a folder or hub name) or a server (server:URL)"
        )
    return one


def open_speaker(spec: Any, context: AnnotatorContext, where: str) -> Speaker:
    """Whoever a setting names, loaded; a model that also teaches is not loaded again."""
    teacher = writer_of(spec, context.models, where)
    questions = context.teachers.questions
    if teacher is None:
        tokenizer = context.teachers.tokenizer
        return ModelSpeaker(context.student, tokenizer, context.reads, questions, context.here)
    voice = teacher.voice(
        context.teachers.on_route("default")
        if spec == "teacher"
        else replace(context.teachers, given=None, given_tokenizer=None)
    )
    if not isinstance(voice, VoiceHere):
        _ = voice.server.served  # it answers, and has the model
        return ServerSpeaker(voice.server)
    head = voice.model.cut(real_vocabulary(voice.tokenizer)).head
    sampler = HFSampler(voice.model.model, voice.tokenizer, head=head)
    return ModelSpeaker(sampler, voice.tokenizer, voice.model.reads, questions, voice.model)
