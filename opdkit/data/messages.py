"""Messages of a row as a chat template takes them: text that holds them is read, keys that only say
null are left out, and what is no text is refused.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from opdkit.base.errors import UserError

Message = dict[str, Any]
INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "thinking", "function_call")


def is_messages(value: Any) -> bool:
    """Whether something is a list of messages: each has a role, and content or what stands for
    it.
    """
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(
            isinstance(m, Mapping)
            and "role" in m
            and any(key in m for key in ("content", *INSTEAD_OF_CONTENT))
            for m in value
        )
    )


def stringified(value: Any) -> Any:
    """Messages that stand in a text, as JSON or as Python shows them; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found = parsed(value)
    return found if is_messages(found) else value


def parsed(value: str) -> Any:
    """A value that stands in a text, as JSON or as Python shows it; None where neither does."""
    for read in (json.loads, ast.literal_eval):  # neither runs anything
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def as_messages(value: Sequence[Mapping[str, Any]], who: str) -> list[Message]:
    """Messages of their own, without keys that a table filled with null; `who` names their row in
    errors.
    """
    return [_message(message, f"message {number} of {who}") for number, message in enumerate(value)]


def _message(given: Mapping[str, Any], who: str) -> Message:
    message = {str(k): _filled(v) for k, v in given.items() if v is not None}
    if not isinstance(message.get("role"), str):
        raise UserError(
            f"{who} has the role {given.get('role')!r}, and a chat template needs one by name, "
            "such as user, assistant, system or tool: fill it"
        )
    if "content" in message:
        message["content"] = _content(message["content"], who)
    elif not any(key in message for key in INSTEAD_OF_CONTENT):
        raise UserError(
            f"{who} has no content, and none of {', '.join(INSTEAD_OF_CONTENT)} in its place: the "
            "model would be asked something that nobody wrote. Fill it, or remove the row"
        )
    return message


def _content(content: Any, who: str) -> Any:
    """Text, or a list of parts that are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UserError(
            f"the content of {who} is {type(content).__name__} ({str(content)[:60]!r}), neither "
            'text nor parts such as [{"type": "text", "text": "..."}]: write it as text'
        )
    return [{"type": "text", "text": _part(part, who)} for part in content]


def _part(part: Any, who: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or "text" not in str(kind):
        raise UserError(
            f"the content of {who} has a part of type {kind!r}, and only text can be read here: an "
            "answer to a question without its picture or sound teaches nothing. Remove such rows"
        )
    return text


def _filled(value: Any) -> Any:
    """Without keys whose value is null: where rows share a table, each has every row's keys."""
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list | tuple) else value


def tools_of(row: Mapping[str, Any], who: str) -> list[dict[str, Any]]:
    """The functions of a row's column `tools`, which may be written as JSON; none where it has no
    such column, or it holds something else beside a prompt that is text.
    """
    given = row.get("tools")
    if given is None or given in ("", [], ()):
        return []
    tools = parsed(given) if isinstance(given, str) else given
    if isinstance(tools, list | tuple) and all(isinstance(t, Mapping) for t in tools):
        found = [_filled(tool) for tool in tools]
        if all(name_of(tool) for tool in found):
            return found
    if isinstance(row.get("prompt"), str):
        return []
    raise UserError(
        f"the column tools of {who} is no list of functions with a name ({str(given)[:60]!r}), "
        "and a chat template writes such a list only: correct the column, or give it another name"
    )


def name_of(tool: Mapping[str, Any]) -> str:
    """The name of a function, or of a call of one; empty where there is none."""
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else ""


def called(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the functions that messages call."""
    calls = [call for m in messages for call in m.get("tool_calls") or []]
    return [name_of(call) for call in calls if isinstance(call, Mapping)]


def text(content: Any) -> str:
    """A message's content as text: a string, or parts such as {"type": "text", "text": "..."}."""
    if isinstance(content, list):
        return "".join(p if isinstance(p, str) else str(p.get("text") or "") for p in content)
    return "" if content is None else str(content)


def turns_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each turn that an assistant takes in a row's conversation, as `load_rows` gives it:
    the messages before the turn as the prompt, what it says as the response. A prompt that is text
    is one turn.
    """
    asked = row["prompt"]
    if not is_messages(asked):
        return [dict(row)]
    within = [i for i, m in enumerate(asked) if i > 0 and m["role"] == "assistant"]
    turns = [
        {**row, "prompt": asked[:i], "response": text(asked[i].get("content")) or None}
        for i in within
    ]
    return [*turns, dict(row)] if row.get("response") or _ends_with_a_turn(row) else turns


def _ends_with_a_turn(row: Mapping[str, Any]) -> bool:
    """Whether an assistant's message of a row that is no text follows the prompt."""
    whole = stringified(row.get("messages"))
    if not is_messages(whole):
        return False
    return whole[-1]["role"] == "assistant" and len(row["prompt"]) < len(whole)
