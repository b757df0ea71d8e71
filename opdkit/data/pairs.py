"""Pairs of responses to one prompt, of which the first was preferred: every layout that this field
uses, as one.

    {"prompt": ..., "chosen": ..., "rejected": ...}    each a text, or messages
    {"chosen": [...], "rejected": [...]}               whole conversations, alike but for the end
    {"chosen": "...", "rejected": "..."}               texts that begin with the prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkit.base.errors import UserError, shown
from opdkit.data.messages import Message, as_messages, is_messages, stringified, text
from opdkit.types import DataRow

PAIR = ("chosen", "rejected")
EMPTY: tuple[Any, ...] = (None, "", [], ())
ANSWERS_HERE = "\n\nAssistant:"  # after which an answer begins in a dialogue that is one text (HH)


def with_prompt(row: DataRow, prompt: Any, who: str) -> DataRow:
    """A row that has a pair, with the prompt that both of its conversations or texts begin with,
    and texts without it; as it is where it has a prompt of its own (`prompt`, else None) that says
    otherwise.
    """
    chosen, rejected = (row[column] for column in PAIR)
    before = [_before(row, column, who) for column in PAIR]
    if prompt is None and is_messages(chosen) and is_messages(rejected):
        if before[0] != before[1] or not before[0]:
            raise UserError(_no_prompt(before, who))
        return {**row, "prompt": before[0]}
    said = [messages for messages in before if messages]
    if prompt is not None and said and all(messages == said[0] for messages in said):
        return {**row, "prompt": said[0]} if _asks(said[0], prompt, who) else row
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        at = _where_answers_begin(chosen, rejected)
        if not chosen[:at].strip():
            raise UserError(
                f"{who} has no prompt, and its texts chosen and rejected do not begin with the "
                f"same words ({shown(chosen)}, {shown(rejected)}): add a column `prompt`, or begin "
                "both with it"
            )
        return {**row, "prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}
    return row


def _no_prompt(before: Sequence[list[Message]], who: str) -> str:
    """Why two conversations without a column for their prompt have none in common."""
    if before == [[], []]:
        return (
            f"{who} has no prompt: chosen and rejected are one message each, and nothing says what "
            "they answer. Add a column `prompt`, or the messages before them"
        )
    return _differ(before, who)


def _differ(before: Sequence[list[Message]], who: str) -> str:
    """Why two conversations are no answers to one prompt."""
    return (
        f"the prompts of {who} differ: what stands before the last message of chosen is not what "
        f"stands before that of rejected ({len(before[0])} and {len(before[1])} messages). A pair "
        "is two answers to one prompt: correct the row, or take it out"
    )


def _before(row: DataRow, column: str, who: str) -> list[Message]:
    """The messages before the answer that a column holds; none where it is a text."""
    value = stringified(row[column])
    return as_messages(value, who)[:-1] if is_messages(value) else []


def _asks(before: list[Message], prompt: Any, who: str) -> bool:
    """Whether a conversation asks the prompt that its row also has by itself."""
    if is_messages(prompt):
        own = as_messages(prompt, who)
        return before == (own[:-1] if own[-1]["role"] == "assistant" else own)
    asked = [text(m.get("content")).strip() for m in before if m["role"] == "user"]
    return isinstance(prompt, str) and prompt.strip() in asked


def _where_answers_begin(a: str, b: str) -> int:
    """The first character of the answers in two texts that begin alike: behind the last
    "Assistant:" that both have, else before the first word in which they differ.
    """
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    turn = a[:same].rfind(ANSWERS_HERE)
    if turn >= 0:
        return turn + len(ANSWERS_HERE)
    while same and not a[same - 1].isspace():
        same -= 1
    return same - 1 if same and a[same - 1] == " " else same


def pair_of(row: DataRow) -> tuple[str, str]:
    """What was preferred in a row of `columns.normalise`, and what was not, as texts; an error
    where it holds no pair of answers to its prompt.
    """
    who = f"row {row['id']!r}"
    missing = [column for column in PAIR if row.get(column) in EMPTY]
    if missing:
        state = "is empty" if missing[0] in row else "is not there"
        raise UserError(
            f"{who} has no pair: its column {missing[0]!r} {state}, and the method learns from "
            "two answers to each prompt, one preferred to the other. Fill chosen and rejected, "
            "name other columns (data.columns={chosen: better, rejected: worse}), or take the row "
            "out"
        )
    chosen, rejected = (_response(row, column, who) for column in PAIR)
    before = [_before(row, column, who) for column in PAIR]
    if all(before) and before[0] != before[1]:
        raise UserError(_differ(before, who))
    if chosen == rejected:
        raise UserError(
            f"chosen and rejected of {who} are the same text ({shown(chosen)}): neither is "
            "preferred, and there is nothing to learn from. Take the row out"
        )
    return chosen, rejected


def _response(row: DataRow, column: str, who: str) -> str:
    """The answer that a column holds, alone or at the end of a conversation."""
    value = stringified(row[column])
    if isinstance(value, str):
        return value
    if not is_messages(value):
        raise UserError(
            f"{column} of {who} is neither text nor messages, but {type(value).__name__}: "
            f"{shown(value)}. Write the answer as a text, or as the last of messages such as "
            '[{"role": "assistant", "content": "..."}]'
        )
    *before, last = as_messages(value, f"{column} of {who}")
    said = text(last.get("content"))
    if last["role"] != "assistant" or not said:
        what = f"a message of the {last['role']}" if last["role"] != "assistant" else "no text"
        raise UserError(
            f"{column} of {who} ends with {what}, and the answer is to be the assistant's last "
            "message, as text: correct the row, or take it out"
        )
    prompt = row["prompt"]
    if before and before != prompt and not _asks(before, prompt, who):
        raise UserError(
            f"the prompts of {who} differ: {column} holds {len(before)} messages before its "
            f"answer, which are not the prompt {shown(prompt)}. A pair is two answers to one "
            "prompt: correct the row, or take it out"
        )
    return said
