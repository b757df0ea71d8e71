"""How an episode is written for a student: its opening, what stands between two of its turns, and
what a turn says.

Nothing that the student wrote is ever written again: of a short conversation around a marked turn,
rendered by the chat template, only what follows the mark is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from opdkit.base.errors import UserError
from opdkit.data import Prompts
from opdkit.data.columns import text as plain_text
from opdkit.environments.base import Message
from opdkit.environments.calls import (
    NAME,
    CallFormat,
    call_format,
    call_id,
    described,
    marked_call,
)
from opdkit.models.chat import MARK, OTHER, has_template, parts, reads_text, rendered
from opdkit.models.thoughts import NEAR, decode, opened, special_marks
from opdkit.models.tokenizers import end_ids
from opdkit.types import DataRow

ENDS = ("\n", " ", "\t")


class Dialogue:
    """Writes for one tokenizer: by its chat template, or as plain text, in which each message is a
    line (or several) and the student's turns are lines between them.

    chat: whether to use the template; None: where there is one. system: a system message before
    openings that have none. enable_thinking: handed to templates that know it. ends: further tokens
    that end a turn, such as those of a model's generation settings.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat: bool | None = None,
        system: str | None = None,
        enable_thinking: bool | None = None,
        ends: Collection[int] = (),
    ):
        self.tokenizer = tokenizer
        self.ends = end_ids(tokenizer) | frozenset(ends)
        self.chat = has_template(tokenizer) if chat is None else chat
        blank = [{"id": "opening", "prompt": "-"}]
        self.prompts = Prompts(
            blank, tokenizer, chat=self.chat, system=system, enable_thinking=enable_thinking
        )
        self.options = self.prompts.options
        self._opens: dict[tuple[int, ...], str] = {}  # thoughts, by the tokens before a turn
        self._ways: dict[tuple[str, ...], int] = {}

    # ------------------------------------------------------------------------------ what is written

    def asked(self, messages: list[Message], tools: Sequence[Any]) -> DataRow:
        """What the student is asked in an opening, as columns of a row of data: whoever writes the
        row's prompt writes the opening.
        """
        if tools and not self.calls.known:
            messages, tools = _told(messages, tools), ()
        if not self.chat:
            return {"prompt": self._lines(messages)}
        return {"prompt": [self._shown(m) for m in messages], "tools": list(tools)}

    def opening(self, row: DataRow, who: str) -> list[int]:
        """What the student reads before its first turn."""
        return self.prompts.tokens({**row, "id": who})

    def reply(
        self, messages: list[Message], tools: Sequence[Any], turn: Sequence[int], who: str
    ) -> list[int]:
        """What follows a turn of the student's: its end, where it did not write that itself, these
        messages, and the start of its next turn.
        """
        if not self.chat:
            cut = turn and self.tokenizer.decode(list(turn)).endswith("\n")
            return self._encode(("" if cut else "\n") + self._lines(messages))
        ids = self._encode(self._after(messages, tools if self.calls.known else (), who))
        ended = bool(turn) and turn[-1] in self.ends
        return ids[1:] if ended and ids[:1] and ids[0] in self.ends else ids

    def action(self, text: str, stop: Sequence[str] = ()) -> list[int]:
        """A turn that another wrote, with what ends it: the template's token, else the first stop
        string, else the end of sequence.
        """
        end = self._end_of(rendered(self.tokenizer, self._marked(), **self.options) or "")
        if self.chat and end:
            return self._encode(text + end)
        if stop:
            return self._encode(text + stop[0])
        last = self.tokenizer.eos_token_id
        return [*self._encode(text), *([] if last is None else [last])]

    def said(self, turn: Sequence[int], before: Sequence[int], stop: Sequence[str]) -> str:
        """What a turn says, decoded, up to the first stop string; without what ends it.

        before: the tokens that it follows.
        """
        [text] = decode(self.tokenizer, [list(turn)], self._marks)
        cuts = [at for s in stop if (at := text.find(s)) >= 0]
        text = text[: min(cuts)] if cuts else text
        tail = tuple(before[-NEAR:])
        if tail not in self._opens:
            self._opens[tail] = opened(self.tokenizer, tail, "")
        start = self._opens[tail]
        return opened(self.tokenizer, tail, text) + text if start else text

    # ------------------------------------------------------------------------------- how, in detail

    @cached_property
    def calls(self) -> CallFormat:
        """How the template writes a call of a function."""
        return call_format(self.tokenizer, self.options) if self.chat else CallFormat()

    @cached_property
    def _marks(self) -> dict[int, str]:
        """Special tokens that stay in what is said: marks of thoughts, and of calls."""
        known = getattr(self.tokenizer, "added_tokens_decoder", {})
        of_calls = {
            i: str(token)
            for i, token in known.items()
            if token.special and i not in self.ends and str(token) in self.calls.written
        }
        return special_marks(self.tokenizer) | of_calls

    @cached_property
    def _texts(self) -> bool:
        return reads_text(self.tokenizer)

    def _after(self, messages: list[Message], tools: Sequence[Any], who: str) -> str:
        """What the template writes after a turn that these messages answer, from its end token on;
        all of it where there is none.
        """
        options = self.options | ({"tools": list(tools)} if tools else {})
        called = self._way(tuple(m["role"] for m in messages), options, who)
        shown = [self._shown(m) for m in _answering(messages, called)]
        text = rendered(
            self.tokenizer, [*self._marked(called), *shown], add_generation_prompt=True, **options
        )
        end = self._end_of(text or "")
        rest = (text or "").rpartition(MARK)[2]
        return rest[rest.index(end) :] if end else rest

    def _way(self, roles: tuple[str, ...], options: dict[str, Any], who: str) -> int:
        """How many calls a turn is shown to make for messages of these roles to be written after
        it; 0: none, and what a function returned is written as a user's message.
        """
        if roles not in self._ways:
            count = roles.count("tool")
            for called in (count, 0) if count else (0,):
                probe = [{"role": role, "content": OTHER} for role in roles]
                shown = [self._shown(m) for m in _answering(probe, called)]
                text = rendered(
                    self.tokenizer,
                    [*self._marked(called), *shown],
                    add_generation_prompt=True,
                    **options,
                )
                _, found, rest = (text or "").rpartition(MARK)
                if found and rest.count(OTHER) == len(roles):
                    self._ways[roles] = called
                    break
            else:
                raise UserError(
                    f"{who}: the chat template does not write {' and '.join(sorted(set(roles)))} "
                    "messages after an assistant's turn, so the student would not read what its "
                    "environment answers. Let step return text (a user's message), or use a model "
                    "whose template knows the role"
                )
        return self._ways[roles]

    def _marked(self, calls: int = 0) -> list[Message]:
        """A question, and a turn that answers it, or calls functions."""
        asked = self._shown({"role": "user", "content": OTHER})
        if calls:
            return [asked, marked_call(calls, self.calls.as_text)]
        return [asked, self._shown({"role": "assistant", "content": MARK})]

    def _end_of(self, text: str) -> str:
        """The text of the token with which the template ends the marked turn; "" where it writes
        none.
        """
        rest = text.rpartition(MARK)[2]
        names = self.tokenizer.convert_ids_to_tokens(sorted(self.ends))
        found = [(at, name) for name in names if (at := rest.find(name)) >= 0]
        return min(found)[1] if found else ""

    def _shown(self, message: Message) -> Message:
        """A message as the template reads it."""
        content = message.get("content")
        if isinstance(content, str) and not self._texts:
            return {**message, "content": parts(content)}
        return message

    def _lines(self, messages: list[Message]) -> str:
        text = "\n".join(plain_text(m.get("content") or "") for m in messages)
        return text if text.endswith(ENDS) else text + "\n"

    def _encode(self, text: str) -> list[int]:
        return self.prompts.encode(text, special=False)


def _answering(messages: Sequence[Message], called: int) -> list[Message]:
    """Messages after a turn with so many calls, each answer named by its call; without calls,
    answers of functions as a user's messages.
    """
    number, shown = 0, []
    for message in messages:
        if message["role"] != "tool":
            shown.append(message)
        elif called:
            shown.append({"name": NAME, "tool_call_id": call_id(number), **message})
            number += 1
        else:
            content = f"```tool_output\n{plain_text(message.get('content'))}\n```"
            shown.append({"role": "user", "content": content})
    return shown


def _told(messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
    """An opening that says itself which functions there are, before its first user's message."""
    shown = [dict(m) for m in messages]
    first = next((m for m in shown if m["role"] == "user"), shown[0])
    first["content"] = f"{described(tools)}\n\n{plain_text(first.get('content'))}"
    return shown
