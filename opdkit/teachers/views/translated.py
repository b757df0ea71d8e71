"""A teacher that may have a tokenizer of its own: it reads the text the student wrote, in its own
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.data import Prompts
from opdkit.models.body import kept_rows, shared_vocabulary
from opdkit.models.layout import Layout
from opdkit.models.limits import context_limit
from opdkit.models.token_bytes import TokenBytes, same_tokens, token_bytes
from opdkit.models.tokenizers import answer_end
from opdkit.objective.alignment import EOS, OUT, AlignedSource, Alignment
from opdkit.objective.head import Head, flat_positions
from opdkit.teachers.base import Scorer, cut, heads_of, reads_of
from opdkit.types import Rollout


@dataclass(frozen=True)
class SameTokenizer:
    """A teacher with the student's tokenizer, for methods that take any: its spans are the
    tokens.
    """

    scorer: Scorer
    stops: frozenset[int]  # ends of sequence

    @property
    def heads(self) -> Sequence[Head]:
        return heads_of(self.scorer)

    @property
    def reads(self) -> int | None:
        return reads_of(self.scorer)

    def cut(self, vocab: int | None) -> SameTokenizer:
        return SameTokenizer(cut(self.scorer, vocab), self.stops)

    def source(self, layout: Layout, positions: Tensor) -> AlignedSource:
        """The teacher at the student's own tokens, at flat positions [N]."""
        source, device = self.scorer.source(layout, positions), positions.device
        lengths = [len(written(r, self.stops)) for r in layout.rollouts]
        closed = [[EOS] * (len(r.tokens) - n) for r, n in zip(layout.rollouts, lengths)]
        ends = table(
            [[*range(1, n + 1), *end] for n, end in zip(lengths, closed)], layout.width, OUT, device
        )
        same = torch.arange(source.vocabulary, device=device)
        return AlignedSource(
            source, Alignment(torch.zeros_like(ends), ends, ends, same, shared=True)
        )


@dataclass(frozen=True, eq=False)
class Translated:
    """A teacher with another tokenizer.

    The student's tokens stay as sampled; the teacher is given their text, behind the prompt as
    `prompt` renders it for the teacher. Bytes that are no text (a response cut inside a character)
    and what the teacher's tokenizer rewrites are not compared, nor is what follows them. A space
    that the tokenizer puts before every text is no part of it.
    """

    scorer: Scorer
    tokenizer: Any  # the teacher's
    student: TokenBytes
    teacher: TokenBytes
    stops: frozenset[int]  # the student's ends of sequence
    eos: tuple[int | None, int | None]  # with which student and teacher close an answer
    prompt: Callable[[Rollout], list[int]]
    limit: int | None = None  # tokens that the teacher can read

    @cached_property
    def same(self) -> Tensor:
        """[V_t]: id of the student's token with the same bytes, and of its end of sequence for the
        teacher's.
        """
        return same_tokens(self.student, self.teacher, self.eos)

    def source(self, layout: Layout, positions: Tensor) -> AlignedSource:
        """The teacher at the spans of text that both divide alike, which end at flat positions
        [N].
        """
        asked = set((positions // max(layout.width, 1)).unique().tolist())
        bodies = [
            written(r, self.stops) if b in asked else [] for b, r in enumerate(layout.rollouts)
        ]
        texts = [whole_characters(self.student.join(body)) for body in bodies]
        ids: list[list[int]] = (
            self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        )
        prompts: dict[str, list[int]] = {}
        rollouts, mine, other = [], [], []
        for b, rollout in enumerate(layout.rollouts):
            if b in asked and rollout.group not in prompts:
                prompts[rollout.group] = self.prompt(rollout)
            prompt = prompts.get(rollout.group, [])
            closed = b in asked and len(bodies[b]) < len(rollout.tokens)
            read, at, there = self._read(bodies[b], texts[b], ids[b], bool(prompt), closed)
            self._refuse_long(rollout, len(prompt) + len(read))
            rollouts.append(
                Rollout(rollout.id, prompt, read, [True] * len(read), [], [], rollout.group)
            )
            mine.append(at)
            other.append(there)
        self._refuse_foreign(texts, mine)
        width, device = max((len(r.tokens) for r in rollouts), default=0), positions.device
        tokens = table([r.tokens for r in rollouts], width, 0, device)
        ends = table(mine, layout.width, OUT, device), table(other, width, OUT, device)
        source = self.scorer.source(Layout(rollouts, width), flat_positions(ends[1] != OUT))
        return AlignedSource(source, Alignment(tokens, *ends, self.same.to(device)))

    def _read(
        self, body: list[int], text: str, ids: list[int], prompted: bool, closed: bool
    ) -> tuple[list[int], np.ndarray, np.ndarray]:
        """The teacher's tokens of a response as far as they are compared, and the ends of tokens on
        both sides; `closed`: it ended itself.
        """
        said = text.encode(), self.teacher.join(ids)
        mine, other = common_ends(self.student.ends(body), self.teacher.ends(ids), *said, prompted)
        read = ids[: int((other != OUT).nonzero()[0].max(initial=-1)) + 1]
        other = other[: len(read)]
        whole = prompted and OUT not in mine[-1:] and len(read) == len(ids)
        if not closed or not whole or self.eos[1] is None:
            return read, mine, other
        return [*read, self.eos[1]], np.append(mine, EOS), np.append(other, EOS)

    def _refuse_long(self, rollout: Rollout, length: int) -> None:
        if self.limit is not None and length > self.limit:
            raise UserError(
                f"rollout {rollout.id} is {length} tokens long in the teacher's tokenizer, prompt "
                f"included, and the teacher reads {self.limit}: lower max_completion_length, or "
                "use a teacher with a longer context"
            )

    def _refuse_foreign(self, texts: Sequence[str], ends: Sequence[np.ndarray]) -> None:
        if any(texts) and not any((mine >= 0).any() for mine in ends):
            example = next(text for text in texts if text)
            raise UserError(
                "not one response of this step comes out of the teacher's tokenizer "
                f"{self.tokenizer.name_or_path!r} as it went in (for example {example[:40]!r}), so "
                "nothing can be compared: it rewrites text or drops characters. Use another teacher"
            )


def as_span_teacher(
    local: Any, theirs: Any, student: Any, stops: Collection[int], questions: Mapping[str, Any]
) -> SameTokenizer | Translated:
    """A teacher in this process as methods take it that compare spans of text.

    Arguments:
        local: its scorer over its own token ids.
        theirs: its tokenizer; None: the student's.
        student: the student's tokenizer.
        stops: ids that end the student's responses.
        questions: the settings of `Prompts` with which the student is asked.
    """
    if theirs is None:
        return SameTokenizer(local, frozenset(stops))
    heads = [local.head]
    own = cut(local, kept_rows(heads, shared_vocabulary(heads, theirs)))
    return translated(own, student, theirs, stops, questions)


def translated(
    scorer: Any, student: Any, tokenizer: Any, stops: Collection[int], asked: Mapping[str, Any]
) -> Translated:
    """A local teacher with its own tokenizer, for a student's.

    `asked` are the settings of `Prompts` that write the questions.

    A student that is asked in a chat has a teacher that is asked in its own chat template, another
    the same plain text.
    """

    def prompt(rollout: Rollout) -> list[int]:
        return Prompts([rollout.row], tokenizer, **asked)[0].tokens

    limit = context_limit(scorer.model.config)
    eos = answer_end(student, bool(asked["chat"])), answer_end(tokenizer, bool(asked["chat"]))
    return Translated(
        scorer,
        tokenizer,
        token_bytes(student),
        token_bytes(tokenizer),
        frozenset(stops),
        eos,
        prompt,
        limit,
    )


def model_and_tokenizer(scorer: Any) -> tuple[Any, Any]:
    """The model behind a teacher, and its tokenizer where that is not the student's."""
    if isinstance(scorer, SameTokenizer):
        return scorer.scorer, None
    return (scorer.scorer, scorer.tokenizer) if isinstance(scorer, Translated) else (scorer, None)


def refuse_chat(chat: bool, tokenizer: Any) -> None:
    """A run that asks in a chat needs a chat template on both sides."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the student is asked in its chat template, and the teacher's tokenizer "
            f"{tokenizer.name_or_path!r} has none: use an instruction-tuned teacher, or "
            "data.chat=false, which asks both in plain text"
        )


def written(rollout: Rollout, stops: frozenset[int]) -> list[int]:
    """A response without its end of sequence."""
    return rollout.tokens[:-1] if rollout.tokens and rollout.tokens[-1] in stops else rollout.tokens


def whole_characters(data: bytes) -> str:
    """The text up to the first byte that is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def common_ends(
    mine: np.ndarray, theirs: np.ndarray, text: bytes, read: bytes, prompted: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Token ends on both sides, `OUT` behind the last byte at which both have one while `read`,
    what the other tokens say, is the text.

    A space before the text belongs to no token. Without a prompt nothing predicts the first token,
    and the first span is left out.
    """
    spaced = read[:1] == b" " and common_bytes(text, read[1:]) > common_bytes(text, read)
    theirs = theirs - spaced
    common = common_bytes(text, read[spaced:])
    meet = np.intersect1d(mine[(mine > 0) & (mine <= common)], theirs[theirs <= common])
    low, high = (0 if prompted else meet[0], meet[-1]) if len(meet) else (0, 0)
    return np.where((low < mine) & (mine <= high), mine, OUT), np.where(
        (low < theirs) & (theirs <= high), theirs, OUT
    )


def common_bytes(a: bytes, b: bytes) -> int:
    """Number of bytes with which both begin."""
    return (
        len(a)
        if a == b
        else next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    )


def table(rows: Sequence[Any], width: int, fill: int, device: torch.device) -> Tensor:
    """[B, width]: rows of different lengths."""
    out = np.full((len(rows), width), fill, dtype=np.int64)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return torch.from_numpy(out).to(device)
