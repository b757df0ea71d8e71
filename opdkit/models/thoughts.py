"""The marks between which models think before they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
NEAR = 8  # tokens at a prompt's end in which a template opens a thought


def decode(
    tokenizer: Any, responses: Sequence[Sequence[int]], marks: Mapping[int, str] | None = None
) -> list[str]:
    """Texts without special tokens but `marks`, by id: those of thoughts, where these are special,
    as a thought must not be taken for the answer.
    """
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    marks = special_marks(tokenizer) if marks is None else marks
    if not marks:
        return list(tokenizer.batch_decode([list(tokens) for tokens in responses], **settings))
    texts = []
    for tokens in responses:
        parts: list[list[int]] = [[]]
        cuts = [""]
        for token in tokens:
            if token in marks:
                parts.append([])
                cuts.append(marks[token])
            else:
                parts[-1].append(token)
        said = tokenizer.batch_decode(parts, **settings)
        texts.append("".join(mark + text for mark, text in zip(cuts, said, strict=True)))
    return texts


def special_marks(tokenizer: Any) -> dict[int, str]:
    """The marks that are special tokens, by id."""
    special = set(tokenizer.all_special_ids)
    names = [mark for pair in THOUGHTS for mark in pair]
    found = {name: tokenizer.convert_tokens_to_ids(name) for name in names} if special else {}
    return {
        id: name for name, id in found.items() if id in special and id != tokenizer.unk_token_id
    }


def opened(tokenizer: Any, prompt: Sequence[int], text: str) -> str:
    """The mark with which a prompt's template opens a thought that the text does not end; "" where
    it does not.
    """
    tail = tokenizer.decode(list(prompt[-NEAR:]), skip_special_tokens=False)
    for start, end in THOUGHTS:
        if tail.rstrip().endswith(start) and end not in text:
            return start
    return ""
