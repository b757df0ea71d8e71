"""Characters and the tokens that wrote them, and a text's segments."""

from __future__ import annotations

import random
from typing import Any

import pytest

from opdkit.annotators.text import Segment, Speller, segments
from opdkit.models.thoughts import decode
from opdkit.types import Rollout
from tests.common.tiny import tiny_tokenizer

TEXT = "Tom has 3 äpfel — 12 plus 30 is 42. 日本 😀 So the answer is \\boxed{7}.\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_each_character_belongs_to_the_tokens_that_hold_its_bytes(tokenizer: Any) -> None:
    """Against a naive count byte by byte; some characters are of several tokens here."""
    tokens = tokenizer(TEXT)["input_ids"] + [2]
    spelt = Speller(tokenizer).spell(tokens)
    assert spelt.text == TEXT == decode(tokenizer, [tokens])[0]
    owner = []  # the token of each byte
    pieces = Speller(tokenizer)._pieces
    for t, token in enumerate(tokens):
        owner += [t] * len(pieces[token])
    assert len(owner) == len(TEXT.encode()) and len(set(owner)) == len(tokens) - 1
    rng = random.Random(1)
    several = 0
    for _ in range(300):
        start, end = sorted(rng.choices(range(len(TEXT) + 1), k=2))
        a, b = (len(TEXT[:x].encode()) for x in (start, end))
        assert spelt.tokens(Segment(start, end)) == sorted(set(owner[a:b]))
        several += end == start + 1 and b - a > 1
    assert several  # among them single characters of several tokens


def test_a_token_that_straddles_an_end_belongs(tokenizer: Any) -> None:
    tokens = tokenizer("the answer")["input_ids"]
    spelt = Speller(tokenizer).spell(tokens)
    last = spelt.tokens(Segment(9, 10))
    width = spelt.ends[last[0]] - (spelt.ends[last[0] - 1] if last[0] else 0)
    assert width > 1  # a merge of several characters
    assert spelt.tokens(Segment(10 - width, 10 - width + 1)) == last
    assert spelt.tokens(Segment(3, 3)) == []


def test_bytes_that_are_no_character_keep_places_countable(tokenizer: Any) -> None:
    """Half of 😀, then text: each stray byte is one U+FFFD, and what follows is found."""
    broken = tokenizer("😀")["input_ids"][:2] + tokenizer("42")["input_ids"]
    spelt = Speller(tokenizer).spell(broken)
    assert spelt.text == "\ufffd\ufffd42"
    assert spelt.tokens(Segment(2, 4)) == list(range(2, len(broken)))
    assert spelt.tokens(Segment(0, 1)) == [0]


def test_places_in_the_text_of_a_rollout_are_shifted(tokenizer: Any) -> None:
    """A thought that the prompt opened stands in the rollout's text, not in its tokens."""
    tokens = tokenizer("so it is 7</think>7")["input_ids"]
    spelt = Speller(tokenizer).spell(tokens)
    n = len(tokens)

    def shift(text: str) -> int:
        return spelt.shift(
            Rollout("0", [1], tokens, [True] * n, [0.0] * n, [0.0] * n, "g", text=text)
        )

    assert shift("so it is 7</think>7") == 0 and shift("<think>so it is 7</think>7") == -7
    assert shift("it is 7") == 3


def test_segments_are_sentences_and_lines() -> None:
    text = "Tom has 3.5 apples. He buys 4.\n\n  So 3 + 4 = 7!  It is\n---\n\\boxed{7}"
    assert [text[s.start : s.end] for s in segments(text)] == [
        "Tom has 3.5 apples.",
        "He buys 4.",
        "So 3 + 4 = 7!",
        "It is",
        "\\boxed{7}",
    ]
