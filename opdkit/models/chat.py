"""What a tokenizer's chat template writes: how it ends an assistant's turn, and which parts of a
message it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MARK, OTHER = "opdkitanswer", "opdkitother"  # texts that no template writes by itself
Message = Mapping[str, Any]


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def rendered(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str | None:
    """The text of a conversation; None where there is no template, or it refuses these messages."""
    if not has_template(tokenizer):
        return None
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception:  # a template is another's program and raises what it likes
        return None


def parts(*texts: str) -> list[dict[str, str]]:
    """A message's content as a list of parts."""
    return [{"type": "text", "text": text} for text in texts]


def reads_text(tokenizer: Any) -> bool:
    """Whether the template writes a content that is text; some read lists of parts only."""
    return MARK in (rendered(tokenizer, [{"role": "user", "content": MARK}]) or "")


def reads_parts(tokenizer: Any) -> bool:
    """Whether the template writes the text of a content that is a list of parts, instead of the
    list as Python shows it.
    """
    text = rendered(tokenizer, [{"role": "user", "content": parts(MARK, OTHER)}]) or ""
    return MARK in text and OTHER in text and "'type'" not in text and '"type"' not in text


def reads_thinking(tokenizer: Any) -> bool:
    """Whether enable_thinking changes what the template writes."""
    asked = [{"role": "user", "content": MARK}]
    on, off = (
        rendered(tokenizer, asked, add_generation_prompt=True, enable_thinking=think)
        for think in (True, False)
    )
    return on != off


def turn_end(tokenizer: Any) -> int | None:
    """The token that the template writes right after an assistant's turn: the last one of a
    conversation, else one that is followed by a user's. None where it writes none there.
    """
    known = getattr(tokenizer, "added_tokens_decoder", {})
    for content in (str, parts):
        system, *turns = [
            {"role": role, "content": content(text)}
            for role, text in (
                ("system", OTHER),
                ("user", OTHER),
                ("assistant", MARK),
                ("user", OTHER),
            )
        ]
        for conversation in (turns[:2], turns, [system, *turns[:2]], [system, *turns]):
            _, found, rest = (rendered(tokenizer, conversation) or "").rpartition(MARK)
            if found and rest.strip():
                ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"]
                return ids[0] if ids[0] in known else None
    return None
