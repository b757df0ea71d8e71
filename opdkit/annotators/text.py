"""The text that a rollout's tokens stand for: which token wrote which characters, and its
segments.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from opdkit.data.columns import text as as_text
from opdkit.data.messages import is_messages
from opdkit.models.thoughts import THOUGHTS, special_marks
from opdkit.models.token_bytes import UNKNOWN, token_bytes
from opdkit.types import Rollout

HALVES = re.compile("[\ud800-\udfff]")  # bytes that are no character
# a sentence ends, and another begins
_SENTENCE = re.compile(r"(?<=[.!?])[ \t]+(?=[A-Z0-9\\$(\"'*])")


@dataclass(frozen=True)
class Segment:
    """Characters start:end of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class Spelt:
    """A text and where its tokens end in it.

    ends: of each token, in bytes; starts: of each character, in bytes.
    """

    text: str
    ends: list[int]
    starts: list[int]

    def tokens(self, segment: Segment) -> list[int]:
        """The tokens that wrote at least a part of these characters: one that straddles an end
        belongs, one that is no text does not.
        """
        if segment.end <= segment.start:
            return []
        first = self.starts[segment.start]
        beyond = self.starts[segment.end]  # the byte after its last character
        # the first token that ends behind `first`, and the first that ends at or behind `beyond`
        found = range(bisect_right(self.ends, first), bisect_left(self.ends, beyond) + 1)
        return [t for t in found if self.ends[t] > (self.ends[t - 1] if t else 0)]

    def shift(self, rollout: Rollout) -> int:
        """What is to be added to a place in `rollout.text` for the place in this text.

        The former may begin with the mark of a thought that the prompt opened, and lack a space
        that its decoder drops at the start.
        """
        at = self.text.find(rollout.text)
        if at >= 0:
            return at
        for mark, _ in THOUGHTS:
            if rollout.text.startswith(mark):
                at = self.text.find(rollout.text[len(mark) :])
                return max(at, 0) - len(mark)
        return 0


class Speller:
    """Spells tokens of one tokenizer; special ones are no text, but for the marks of thoughts."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = list(token_bytes(self.tokenizer).pieces)
        kept = special_marks(self.tokenizer)
        for token in self.tokenizer.all_special_ids:
            if token not in kept and token < len(pieces):
                pieces[token] = b""
        return pieces

    def spell(self, tokens: Sequence[int]) -> Spelt:
        """The text of tokens, each with its bytes; bytes that are no character are U+FFFD."""
        pieces = [self._pieces[t] if t < len(self._pieces) else b"" for t in tokens]
        # one character for each byte that is part of none, so that places stay countable
        text = b"".join(pieces).decode("utf-8", errors="surrogateescape")
        plain = text.isascii()
        lengths = (1 if plain or HALVES.match(c) else len(c.encode()) for c in text)
        starts = list(accumulate(lengths, initial=0))
        ends = list(accumulate(map(len, pieces)))
        return Spelt(HALVES.sub(UNKNOWN, text), ends, starts)


def segments(text: str) -> list[Segment]:
    """Lines, and the sentences in them; white space around them and lines without a letter or
    number left out.
    """
    found: list[Segment] = []
    start = 0
    for line in text.splitlines(keepends=True):
        cuts = [0, *(m.end() for m in _SENTENCE.finditer(line)), len(line)]
        for a, b in pairwise(cuts):
            said = line[a:b]
            if re.search(r"\w", said):
                left = len(said) - len(said.lstrip())
                found.append(Segment(start + a + left, start + a + len(said.rstrip())))
        start += len(line)
    return found


def marked(length: int, tokens: Iterable[int]) -> list[bool]:
    """[length]: whether each token is one of these."""
    chosen = set(tokens)
    return [t in chosen for t in range(length)]


def question_of(rollout: Rollout) -> str:
    """What a rollout answers, as text."""
    prompt = rollout.row.get("prompt", "")
    if is_messages(prompt):
        return "\n\n".join(f"{m['role']}: {as_text(m.get('content'))}" for m in prompt)
    return str(prompt)
