"""The bytes that a tokenizer's tokens stand for, and which tokens of two tokenizers stand for the
same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdkit.base.errors import UserError

UNKNOWN = "\ufffd"  # what decoders write for bytes that are no whole character
HEX = re.compile(r"<0x([0-9A-F]{2})>")  # byte tokens of SentencePiece


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (GPT-2 and its heirs) writes bytes as: printable ones as
    themselves, others from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


ALPHABET = byte_alphabet()


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """What each id stands for when it follows other text."""

    pieces: list[bytes]
    # ids of tokens such as <0x41>, which stand for a byte that another token may stand for as well
    fallback: frozenset[int]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def join(self, ids: Sequence[int]) -> bytes:
        return b"".join([self.pieces[i] for i in ids])

    def ends(self, ids: Sequence[int]) -> np.ndarray:
        """The byte at which each token of a text ends."""
        return self.lengths[np.asarray(ids, dtype=np.int64)].cumsum()


def token_bytes(tokenizer: Any) -> TokenBytes:
    """By decoding each token behind another one, as some decoders drop a space at the start of a
    text.

    A token that is no whole character is known by its spelling: a byte of SentencePiece, or the
    byte alphabet.
    """
    names = {i: name for name, i in tokenizer.get_vocab().items()}
    anchor = next(
        (i for c in "a0" for i in [tokenizer.get_vocab().get(c)] if i is not None), min(names)
    )
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode([anchor], **settings)
    texts = tokenizer.batch_decode([[anchor, i] for i in names], **settings)
    pieces = [b""] * (max(names) + 1)
    for (i, name), text in zip(names.items(), texts):
        if not text.startswith(before):
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} writes its token {name!r} differently "
                "behind other text, so its tokens cannot be laid beside another tokenizer's. Use a "
                "teacher of the student's family"
            )
        pieces[i] = _partial(name) if UNKNOWN in text else text[len(before) :].encode()
    return TokenBytes(pieces, frozenset(i for i, name in names.items() if HEX.fullmatch(name)))


def _partial(name: str) -> bytes:
    if found := HEX.fullmatch(name):
        return bytes.fromhex(found[1])
    if all(c in ALPHABET for c in name):
        return bytes(ALPHABET[c] for c in name)
    return name.encode()  # U+FFFD itself


def same_tokens(
    student: TokenBytes, teacher: TokenBytes, eos: tuple[int | None, int | None] = (None, None)
) -> Tensor:
    """[V_t]: id of the student's token with the same bytes as each of the teacher's, -1 where there
    is none; no id comes twice.

    The ends of sequence, student's and teacher's, correspond whatever their names.
    """

    mine, theirs = eos if None not in eos else (None, None)

    def ordered(side: TokenBytes, end: int | None) -> list[int]:
        return sorted(
            (i for i, piece in enumerate(side.pieces) if piece and i != end),
            key=lambda i: (i in side.fallback, i),
        )

    ids: dict[bytes, list[int]] = {}
    for i in reversed(ordered(student, mine)):
        ids.setdefault(student.pieces[i], []).append(i)
    same = torch.full((len(teacher.pieces),), -1, dtype=torch.int64)
    for i in ordered(teacher, theirs):
        if found := ids.get(teacher.pieces[i]):
            same[i] = found.pop()
    if mine is not None and theirs is not None:
        same[theirs] = mine
    return same
