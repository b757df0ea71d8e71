"""How a teacher speaks, by its own tokenizer and generation settings: with what it ends an answer,
and whether it is asked as the student is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from opdkit.models.chat import OTHER, has_template, rendered
from opdkit.models.engines.chat import ChatServer
from opdkit.models.load import generation_settings
from opdkit.models.tokenizers import end_ids, same_ends, shared_ids
from opdkit.teachers.context import TeacherContext


@dataclass(frozen=True)
class VoiceHere:
    """A model in this process that text can be sampled from."""

    model: Any  # a `local.LocalModel`
    tokenizer: Any  # its own


@dataclass(frozen=True)
class VoiceElsewhere:
    """A model that answers messages behind HTTP."""

    server: ChatServer


def ends_of(model: Any, tokenizer: Any, context: TeacherContext) -> frozenset[int]:
    """The student's ids with which a model ends its answers.

    Arguments:
        model: by name, or loaded.
        tokenizer: its own; None: the student's.
    """
    settings = generation_settings(model, context.trust_remote_code)
    if tokenizer is None:
        return end_ids(context.tokenizer, settings)
    ends = end_ids(tokenizer, settings)
    shared = shared_ids(context.tokenizer, tokenizer)
    if shared is None:
        return same_ends(ends, tokenizer, context.tokenizer)
    return frozenset(i for i in ends if i < shared)


def note_questions(name: str, tokenizer: Any, context: TeacherContext) -> None:
    """Says where a teacher reads questions, by the student's token ids, that are not written as it
    is asked.
    """
    if not has_template(tokenizer):
        return
    if not context.questions["chat"]:
        print(
            f"opdkit: {name} is a chat model, and the student is asked in plain text: the teacher "
            "scores answers to questions that are not in its chat template, which it may find "
            "improbable whatever they say. Give the student's tokenizer the teacher's chat "
            "template, or use a base model as the teacher",
            file=sys.stderr,
        )
        return
    asked = [{"role": "user", "content": OTHER}]
    thinking = context.questions.get("enable_thinking")
    options = {} if thinking is None else {"enable_thinking": thinking}
    written = [
        rendered(t, asked, add_generation_prompt=True, **options)
        for t in (context.tokenizer, tokenizer)
    ]
    if written[0] != written[1]:
        print(
            f"opdkit: {name} has another chat template than the student, in which the questions "
            f"are written: {str(written[0])!r} where it would be asked {str(written[1])!r}",
            file=sys.stderr,
        )
