"""Rows as prompts: chat template or plain text, then token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from string import Formatter
from typing import Any, overload

from opdkit.base.errors import UserError, nearest, shown
from opdkit.base.progress import progress
from opdkit.data.columns import look
from opdkit.data.messages import (
    Message,
    as_messages,
    called,
    is_messages,
    name_of,
    text,
    tools_of,
    turns_of,
)
from opdkit.data.pairs import PAIR, pair_of
from opdkit.models.chat import (
    has_template,
    parts,
    reads_parts,
    reads_text,
    reads_thinking,
    rendered,
)
from opdkit.models.tokenizers import answer_end
from opdkit.types import DataRow, Prompt

MANY = 20_000  # prompts whose tokenising takes long enough to show progress (about 8000 per second)
NAMED = 10  # dropped prompts that a report lists one by one


class Prompts(Sequence[Prompt]):
    """The prompts of a data set.

    Those longer than `max_prompt_length` tokens are left out, never cut, and named in `dropped`.

    rows: from `load_rows`. chat: whether to use the tokenizer's chat template; None: where it has
    one. template: what the model is asked, with columns in braces, such as "{prompt}\\nPut your
    answer in \\\\boxed{{}}." system: a system message for rows without one. enable_thinking: handed
    to chat templates that know it (Qwen3). Prompts are tokenised when first read, and all at once
    where there is a `max_prompt_length`.
    """

    def __init__(
        self,
        rows: Sequence[DataRow],
        tokenizer: Any,
        *,
        max_prompt_length: int | None = None,
        template: str | None = None,
        system: str | None = None,
        chat: bool | None = None,
        enable_thinking: bool | None = None,
    ):
        self.tokenizer, self.template, self.system = tokenizer, template, system
        self.chat = has_template(tokenizer) if chat is None else chat
        self.vocabulary: int | None = None  # ids that all models have, once that is known
        self.options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.dropped: list[str] = []  # "id (n tokens)"
        self.max_prompt_length = max_prompt_length
        self._check(rows)
        self.rows = list(rows)
        self._prompts: list[Prompt | None] = [None] * len(self.rows)
        self._asked = len(self.rows)
        if max_prompt_length is not None:
            self._drop(max_prompt_length)

    def _check(self, rows: Sequence[DataRow]) -> None:
        if not rows:
            raise UserError(
                "there are no rows to make prompts of: check the data set's path, split and filters"
            )
        if "prompt" not in rows[0] or "id" not in rows[0]:
            raise UserError(
                "Prompts takes rows with 'prompt' and 'id', as load_rows gives them: "
                "Prompts(load_rows(rows), tokenizer)"
            )
        if self.chat and not has_template(self.tokenizer):
            raise UserError(
                "chat=True needs a chat template, and this tokenizer has none: use chat=False, or "
                "an instruction model's"
            )
        if not self.chat and (self.system is not None or self.options):
            what = "system" if self.system is not None else "enable_thinking"
            raise UserError(
                f"{what} is part of a chat, and these prompts are plain text (no chat template): "
                "write it into template"
            )
        if self.template is not None:
            check_template(self.template, rows[:1])

    def _drop(self, longest: int) -> None:
        prompts = []
        with (
            progress("Tokenising prompts", total=len(self), unit="prompts")
            if len(self) > MANY
            else nullcontext(int) as tick
        ):
            for i in range(len(self)):
                prompts.append(self[i])
                tick(i + 1)
        lengths = [len(p.tokens) for p in prompts]
        if min(lengths) > longest:
            raise UserError(
                f"all {len(prompts)} prompts are longer than max_prompt_length={longest}, so none "
                f"is left: the shortest has {min(lengths)} tokens, the longest {max(lengths)}. Set "
                f"max_prompt_length to {max(lengths)} for all of them"
            )
        kept = [i for i, n in enumerate(lengths) if n <= longest]
        self.dropped = [
            f"{p.id} ({n} tokens)" for p, n in zip(prompts, lengths, strict=True) if n > longest
        ]
        self.rows, self._prompts = [self.rows[i] for i in kept], [prompts[i] for i in kept]

    def report(self) -> str:
        """One sentence on how many prompts there are and which were dropped."""
        if not self.dropped:
            return f"{len(self)} prompts"
        rest = f" and {len(self.dropped) - NAMED} more" if len(self.dropped) > NAMED else ""
        return (
            f"{len(self)} of {self._asked} prompts; {len(self.dropped)} dropped, longer than "
            f"max_prompt_length={self.max_prompt_length}: {', '.join(self.dropped[:NAMED])}{rest}"
        )

    @property
    def notes(self) -> list[str]:
        """What is to be known of how the questions are written."""
        said = [self.report()] if self.dropped else []
        if self.options and not reads_thinking(self.tokenizer):
            said.append(
                f"enable_thinking={self.options['enable_thinking']} changes nothing: the chat "
                f"template of {self.tokenizer.name_or_path or 'the tokenizer'} does not read it"
            )
        return said

    def refuse_unknown(self, vocabulary: int) -> None:
        """Refuses prompts with a token that not every model of a run has, which share the first
        `vocabulary` ids; from now on reference responses too, when they are read.
        """
        self.vocabulary = vocabulary
        for prompt in self:
            self._known(prompt.tokens, f"prompt of row {prompt.id!r}")

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        prompt = self._prompts[index]
        if prompt is None:
            row = self.rows[index]
            prompt = self._prompts[index] = Prompt(id=row["id"], tokens=self.tokens(row), row=row)
        return prompt

    def response_tokens(self, index: int) -> list[int] | None:
        """The row's reference response as the student would have written it: its ids, and what ends
        an answer.

        None where the row has none.
        """
        row = self.rows[index]
        if not (response := row.get("response")):
            return None
        return self._answer(response, f"response of row {row['id']!r}")

    def pair(self, index: int) -> tuple[tuple[list[int], str], tuple[list[int], str]]:
        """What the row prefers and what it does not, each as the student would have written it: its
        ids, and its text.
        """
        row = self.rows[index]
        chosen, rejected = (
            (self._answer(said, f"{column} response of row {row['id']!r}"), said)
            for column, said in zip(PAIR, pair_of(row))
        )
        return chosen, rejected

    def _answer(self, said: str, what: str) -> list[int]:
        """The ids of a response, and what ends an answer."""
        ids = self._known(self.encode(said, special=False), what)
        return ids if self.end is None or ids[-1:] == [self.end] else [*ids, self.end]

    def tokens_of(self, row: DataRow) -> list[int]:
        """The ids of a row that is asked as these are, be it one of them or not."""
        return self._known(self.tokens(row), f"prompt of row {row['id']!r}")

    def turns(self, index: int) -> list[Prompt]:
        """A prompt for each turn that an assistant takes in the row's conversation, with all
        messages before it; one that is asked as it is, where there is no other.
        """
        whole, rows = self[index], turns_of(self.rows[index])
        made = []
        for number, row in enumerate(rows, 1):
            id = whole.id if len(rows) == 1 else f"{whole.id}:turn{number}"
            what = f"turn {number} of row {whole.id!r}"
            same = row["prompt"] == whole.row["prompt"]
            tokens = whole.tokens if same else self._known(self.tokens(row), what)
            row = whole.row if same and len(rows) == 1 else {**row, "id": id}
            made.append(Prompt(id, tokens, row, question=whole.question, group=id))
        return made

    def drop_unanswered(self) -> str:
        """Leaves out conversations in which no assistant takes a turn; says which, "" where there
        are none.
        """
        kept = [i for i, row in enumerate(self.rows) if turns_of(row)]
        gone = [row["id"] for row in self.rows if not turns_of(row)]
        if not kept:
            raise UserError(
                f"none of the {len(gone)} conversations has an assistant's message, and the "
                "student is to write those: the data needs whole trajectories in `messages`"
            )
        total = len(self.rows)
        self.rows = [self.rows[i] for i in kept]
        self._prompts = [self._prompts[i] for i in kept]
        rest = f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
        said = f"have no assistant's message and are left out: {', '.join(gone[:NAMED])}{rest}"
        return f"{len(gone)} of {total} conversations {said}" if gone else ""

    # ----------------------------------------------------------------------------------- one prompt

    def tokens(self, row: DataRow) -> list[int]:
        """A row's question as the student reads it, up to where its answer begins."""
        prompt = row["prompt"]
        if self.chat:
            return self._one_start(self._chat_tokens(row))
        if not isinstance(prompt, str):
            raise UserError(
                f"the prompt of row {row['id']!r} is a list of messages, which only a chat "
                "template can write as text: use a tokenizer with one (and not chat=False), or "
                "prompts that are plain text"
            )
        return self._plain(self._fill(prompt, row))

    def _chat_tokens(self, row: DataRow) -> list[int]:
        tools = tools_of(row, f"row {row['id']!r}")
        options = self.options | ({"tools": tools} if tools else {})
        messages = self._conversation(row, options)
        try:
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **options
            )
        # templates raise of their own accord ("System role not supported"), and what Python raises
        # for what they do
        except Exception as error:
            raise UserError(
                f"the chat template refuses row {row['id']!r}: {error}. Change the row's messages, "
                f"or {self._way_out()}"
            ) from error
        if names := {*map(name_of, tools), *called(messages)} - {""}:
            self._refuse_unwritten(names, messages, options, row)
        return list(ids)

    def _conversation(self, row: DataRow, options: dict[str, Any]) -> list[Message]:
        """The row's messages as this tokenizer's template reads them."""
        prompt, who = row["prompt"], f"row {row['id']!r}"
        messages = (
            as_messages(prompt, who)
            if is_messages(prompt)
            else [{"role": "user", "content": prompt}]
        )
        if self.template is not None:
            asked = next((m for m in reversed(messages) if m["role"] == "user"), None)
            if asked is None:
                raise UserError(
                    f"template fills a user's message, and the prompt of {who} has none: leave "
                    "template out"
                )
            asked["content"] = self._fill(text(asked.get("content")), row)
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        for message in messages:
            if isinstance(message.get("content"), list):
                if not self._reads_parts:
                    message["content"] = text(message["content"])
            elif "content" in message and not self._reads_text:
                message["content"] = parts(message["content"])
        if all("content" in m for m in messages):
            return messages
        return self._without_content(messages, options)

    def _without_content(self, messages: list[Message], options: dict[str, Any]) -> list[Message]:
        """Messages of which some have no content: null where the template knows that, else an empty
        text, as some write "None" for it or add it to other text.
        """
        null, empty = ([{"content": c, **m} for m in messages] for c in (None, ""))
        said, plain = (rendered(self.tokenizer, m, **options) for m in (null, empty))
        known = said is not None and (plain is None or said.count("None") <= plain.count("None"))
        return null if known else empty

    @cached_property
    def end(self) -> int | None:
        """The token that closes a reference response."""
        return answer_end(self.tokenizer, self.chat)

    @cached_property
    def _reads_parts(self) -> bool:
        return reads_parts(self.tokenizer)

    @cached_property
    def _reads_text(self) -> bool:
        return reads_text(self.tokenizer) or not self._reads_parts

    def _refuse_unwritten(
        self, names: set[str], messages: list[Message], options: dict[str, Any], row: DataRow
    ) -> None:
        """Functions of which the template writes nothing."""
        asked = rendered(self.tokenizer, messages, add_generation_prompt=True, **options) or ""
        if left_out := sorted(name for name in names if name not in asked):
            raise UserError(
                f"row {row['id']!r} offers or calls the function {left_out[0]!r}, and the chat "
                "template does not write it: the student would be asked without it. Use a model "
                "whose template knows tools, or remove the column tools and messages with "
                "tool_calls"
            )

    def _known(self, ids: list[int], what: str) -> list[int]:
        """Ids, each of which all models of the run have."""
        if self.vocabulary is not None and (largest := max(ids, default=0)) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"the {what} holds the token {token!r} (id {largest}), and the models of the run "
                f"share only {self.vocabulary} ids: one of them never learnt it, and whatever it "
                "said of the text would be noise. Remove it from the data (or from the template), "
                "or use models that both have it"
            )
        return ids

    def _one_start(self, ids: list[int]) -> list[int]:
        """Without a second start of sequence, which the tokenizer adds to one that is written."""
        start = self.tokenizer.bos_token_id
        return ids[1:] if start is not None and ids[:2] == [start, start] else ids

    def _way_out(self) -> str:
        return (
            "leave out system"
            if self.system is not None
            else "use chat=False with prompts that are plain text"
        )

    def _plain(self, prompt: str) -> list[int]:
        """With the tokenizer's own start of sequence, without an end: the model is to go on."""
        ids, bare = (self.encode(prompt, special=special) for special in (True, False))
        if bare[:1] == [self.tokenizer.bos_token_id]:
            ids = self._one_start(ids)
        end = self.tokenizer.eos_token_id
        added = end is not None and ids[-1:] == [end] and bare[-1:] != [end]
        return ids[:-1] if added else ids

    def encode(self, written: str, *, special: bool) -> list[int]:
        """A text as it stands, as ids; special: with what the tokenizer adds around it."""
        try:
            return list(self.tokenizer(written, add_special_tokens=special)["input_ids"])
        # such as a token that a vocabulary without an unknown one does not have
        except Exception as error:
            raise UserError(
                f"the tokenizer cannot read {shown(written)} ({type(error).__name__}: "
                f"{str(error)[:300]}): take that text out of the data (or of what an "
                "environment answers), or use a model whose tokenizer covers it"
            ) from error

    def _fill(self, prompt: str, row: DataRow) -> str:
        if self.template is None:
            return prompt
        filled = {**row, "prompt": prompt}
        return fill(self.template, lambda name: _value(filled, name))


def check_template(template: str, rows: Sequence[DataRow]) -> None:
    """Refuses a template that cannot be filled from every row."""
    names = names_in(template)
    if not names:
        raise UserError(
            f"template={shown(template)} names no column, so every prompt would be the same: put "
            f"{{prompt}} in it"
        )
    for row in rows:
        for name in names:
            _value(row, name)


def names_in(template: str) -> set[str]:
    """What a template names in braces."""
    return {name for _, name in _parts(template) if name is not None}


def fill(template: str, read: Callable[[str], str]) -> str:
    """A template with what `read` gives for each name in braces."""
    return "".join(
        before + ("" if name is None else read(name)) for before, name in _parts(template)
    )


def _value(row: DataRow, name: str) -> str:
    """A column as text; `a.b` and `a[b]` look inside a column, `a[0]` in a list."""
    column, *keys = re.split(r"\[|\]\[|\]$", name.removesuffix("]"))
    found = look(row, column)
    if found is None and column not in row:
        raise UserError(
            f"template reads the column {column!r}, which row {row['id']!r} does not "
            f"have{nearest(column, list(row))}"
        )
    for key in keys:
        try:
            if isinstance(found, str):
                raise TypeError("it is a text")
            found = found[int(key) if key.isdigit() else key]
        except (TypeError, KeyError, IndexError) as error:
            raise UserError(
                f"template reads {{{name}}}, and row {row['id']!r} has no [{key}] there ({error}): "
                "name a column that is a list or a mapping, and a place in it"
            ) from None
    return str(found)


def _parts(template: str) -> list[tuple[str, str | None]]:
    """A template as texts, each with the column that follows it; None at the end."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise _braces(template, str(error)) from None
    for _, name, form, conversion in parts:
        if name == "":
            raise _braces(template, "{} names no column")
        if name is not None and (form or conversion):
            raise _braces(template, f"{{{name}}} with signs that change its form")
    return [(before, name) for before, name, _, _ in parts]


def _braces(template: str, why: str) -> UserError:
    return UserError(
        f"template={shown(template)} cannot be read ({why}): braces name columns, as in "
        f"{{prompt}}, and nothing else; write a literal one twice, as in \\boxed{{{{}}}}"
    )
