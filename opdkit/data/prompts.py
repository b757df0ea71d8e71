"""Rows as prompts: chat template or plain text, then token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from string import Formatter
from typing import Any, overload

from opdkit.base.errors import UserError, nearest, shown
from opdkit.base.progress import progress
from opdkit.data.columns import look, text
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
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self.tokenizer, self.template, self.system = tokenizer, template, system
        self.chat = has_template if chat is None else chat
        self.options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.dropped: list[str] = []  # "id (n tokens)"
        self.max_prompt_length = max_prompt_length
        self._check(rows, has_template)
        self.rows = list(rows)
        self._prompts: list[Prompt | None] = [None] * len(self.rows)
        self._asked = len(self.rows)
        if max_prompt_length is not None:
            self._drop(max_prompt_length)

    def _check(self, rows: Sequence[DataRow], has_template: bool) -> None:
        if not rows:
            raise UserError(
                "there are no rows to make prompts of: check the data set's path, split and filters"
            )
        if "prompt" not in rows[0] or "id" not in rows[0]:
            raise UserError(
                "Prompts takes rows with 'prompt' and 'id', as load_rows gives them: "
                "Prompts(load_rows(rows), tokenizer)"
            )
        if self.chat and not has_template:
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
            prompt = self._prompts[index] = Prompt(id=row["id"], tokens=self._tokens(row), row=row)
        return prompt

    def response_tokens(self, index: int) -> list[int] | None:
        """The row's reference response as the student would have written it: its ids, and the end
        of sequence.

        None where the row has none.
        """
        response = self.rows[index].get("response")
        if not response:
            return None
        ids = self._encode(response, special=False)
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    # ----------------------------------------------------------------------------------- one prompt

    def _tokens(self, row: DataRow) -> list[int]:
        prompt = row["prompt"]
        if not self.chat:
            if not isinstance(prompt, str):
                raise UserError(
                    f"the prompt of row {row['id']!r} is a list of messages, which only a chat "
                    "template can write as text: use a tokenizer with one (and not chat=False), or "
                    "prompts that are plain text"
                )
            return self._plain(self._fill(prompt, row))
        messages = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else [dict(m) for m in prompt]
        )
        if self.template is not None:
            asked = next((m for m in reversed(messages) if m["role"] == "user"), None)
            if asked is None:
                raise UserError(
                    f"template fills a user's message, and the prompt of row {row['id']!r} has "
                    "none: leave template out"
                )
            asked["content"] = self._fill(text(asked["content"]), row)
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        try:
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **self.options
            )
        # templates raise errors of their own ("System role not supported"), and any other for
        # messages of a form that they did not expect
        except Exception as error:
            raise UserError(
                f"the chat template refuses row {row['id']!r} ({type(error).__name__}: "
                f"{str(error)[:300]}). Change the row's messages, or {self._way_out()}"
            ) from error
        return list(ids)

    def _way_out(self) -> str:
        return (
            "leave out system"
            if self.system is not None
            else "use chat=False with prompts that are plain text"
        )

    def _plain(self, prompt: str) -> list[int]:
        """With the tokenizer's own start of sequence, without an end: the model is to go on."""
        ids = self._encode(prompt, special=True)
        end = self.tokenizer.eos_token_id
        if (
            end is not None
            and ids[-1:] == [end]
            and self._encode(prompt, special=False)[-1:] != [end]
        ):
            return ids[:-1]
        return ids

    def _encode(self, written: str, *, special: bool) -> list[int]:
        try:
            return list(self.tokenizer(written, add_special_tokens=special)["input_ids"])
        # such as a token that a vocabulary without an unknown one does not have
        except Exception as error:
            raise UserError(
                f"the tokenizer cannot read {shown(written)} ({type(error).__name__}: "
                f"{str(error)[:300]}): take that text out of the data, or use a model whose "
                "tokenizer covers it"
            ) from error

    def _fill(self, prompt: str, row: DataRow) -> str:
        if self.template is None:
            return prompt
        filled = {**row, "prompt": prompt}
        return "".join(
            before + ("" if name is None else _value(filled, name))
            for before, name in _parts(self.template)
        )


def check_template(template: str, rows: Sequence[DataRow]) -> None:
    """Refuses a template that cannot be filled from every row."""
    names = {name for _, name in _parts(template) if name is not None}
    if not names:
        raise UserError(
            f"template={shown(template)} names no column, so every prompt would be the same: put "
            f"{{prompt}} in it"
        )
    for row in rows:
        for name in names:
            _value(row, name)


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
