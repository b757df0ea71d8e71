"""Two tokenizers on one text: which of their tokens cover the same bytes, and a model read where
the student's tokens end.

A *span* is the shortest stretch of text at whose end both tokenizers have a token end. A loss
compares one pair of distributions per span, at the last of the student's tokens in it; where both
have one token there, these are the two models' next-token distributions.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from opdkit.objective.facts import Fact, ReadFrom
from opdkit.objective.head import chunk_rows, slices
from opdkit.objective.kernels import Vocabulary
from opdkit.objective.kernels.paired import FLOOR, Match

MERGES = ("bayesian", "observed", "index")
OUT, EOS = -1, -2  # in place of a token's end


# ---------------------------------------------------------------------------------------- alignment


@dataclass(frozen=True, eq=False)
class Alignment:
    """How another tokenizer divides the same responses.

    Ends are the byte of the UTF-8 text at which a token ends, counted from the start of the
    response; `EOS` at the end of sequence, which is no text; `OUT` where a token is left out
    (padding). `same` holds for each of its tokens the id of the student's with the same text, -1
    where there is none; what a head has beyond that only pads it. `shared`: it is the student's
    tokenizer, on the student's very tokens.
    """

    tokens: Tensor  # [B, U] ids of the other tokenizer
    student_ends: Tensor  # [B, T]
    ends: Tensor  # [B, U]
    same: Tensor | None = None  # [V_t]
    shared: bool = False

    def all_ends(self, eos: bool) -> tuple[Tensor, Tensor]:
        """Ends [B, T] and [B, U] on both sides; with `eos` the end of sequence ends one byte after
        the text, else it is out.
        """
        both = []
        for ends in (self.student_ends, self.ends):
            behind = ends.amax(1, keepdim=True).clamp_min(0) + 1 if eos and ends.shape[1] else OUT
            both.append(torch.where(ends == EOS, behind, ends))
        return both[0], both[1]


class Spans(NamedTuple):
    """N spans: the flat index of the last token of each on either side, and how many tokens it has
    there.
    """

    last: Tensor  # [N] in [B * T]
    tokens: Tensor  # [N]
    other_last: Tensor  # [N] in [B * U]
    other_tokens: Tensor  # [N]


def align(student_ends: Tensor, ends: Tensor) -> Spans:
    """The spans of token ends [B, T] and [B, U], row by row.

    Walk both lists, always on the side that ends earlier; where both end at the same byte a span
    closes. What is left of a row makes a last span if both sides have some of it.
    """
    sides = [_Side.of(x, student_ends, ends) for x in (student_ends, ends)]
    closed = [torch.isin(a.keys, b.keys) for a, b in (sides, sides[::-1])]
    left = [torch.zeros(len(student_ends), dtype=torch.bool, device=ends.device) for _ in sides]
    for mine, side, done in zip(left, sides, closed):
        mine[side.row[side.final]] = ~done[side.final]
    both = left[0] & left[1]
    found = []
    for side, done in zip(sides, closed):
        done[side.final] |= both[side.row[side.final]]
        at = done.nonzero()[:, 0]
        before = torch.cat([at.new_full((1,), -1), at[:-1]])
        # not what the row above has left
        begin = torch.maximum(before + 1, side.first[side.row[at]])
        found += [side.flat[at], at - begin + 1]
    return Spans(*found)


class _Side(NamedTuple):
    """The tokens of one side that have an end, row after row."""

    flat: Tensor  # [n] index in the table
    row: Tensor  # [n]
    # [n] equal on both sides where the same byte of the same row ends, for the first, second ...
    # time
    keys: Tensor
    first: Tensor  # [B] place in these lists of each row's first token
    final: Tensor  # places of the rows' last tokens

    @staticmethod
    def of(ends: Tensor, *both: Tensor) -> _Side:
        """Of the ends [B, T or U] of one side, and those of `both`."""
        flat = (ends >= 0).flatten().nonzero()[:, 0]
        row = flat // max(ends.shape[1], 1)
        bytes_ = 2 + max((int(x.max()) for x in both if x.numel()), default=0)
        keys = row * bytes_ + ends.flatten()[flat]
        place = torch.arange(len(keys), device=ends.device)
        # tokens without bytes end where the one before did
        again = place - torch.searchsorted(keys, keys)
        first = torch.searchsorted(row, torch.arange(len(ends), device=ends.device))
        final = (torch.searchsorted(row, row, right=True) - 1 == place).nonzero()[:, 0]
        return _Side(flat, row, keys * (1 + max(x.shape[1] for x in both)) + again, first, final)


def by_number(student_ends: Tensor, ends: Tensor) -> Spans:
    """The t-th token of each row of [B, T] with the t-th of [B, U], as far as both go: spans of one
    token, whatever their text.
    """
    width = min(student_ends.shape[1], ends.shape[1])
    row, column = ((student_ends[:, :width] >= 0) & (ends[:, :width] >= 0)).nonzero(as_tuple=True)
    one = torch.ones_like(row)
    return Spans(row * student_ends.shape[1] + column, one, row * ends.shape[1] + column, one)


# -------------------------------------------------------------------------------- facts of a model


@dataclass(frozen=True)
class SpanFact(Fact):
    """Of a model that may have a tokenizer of its own: it reads the same text, and spans of it are
    compared.

    what: "tokens" [B, T] int, how many of the student's tokens make up the span that ends here, 0
    where none ends; "logp" [B, T], the model's log-prob of its own tokens of that span, without the
    one whose distribution is compared; "vocabulary", that distribution, chunk by chunk; "single"
    [B, T] bool, whether it is one token on both sides; "shared" [B, 1] bool, whether the model has
    the student's tokenizer. merge: "bayesian", "observed" or "index". eos: whether the ends of
    sequence are a span as well.
    """

    model: str
    what: str
    merge: str = ""
    eos: bool = False
    temperature: float = 1.0
    own_tokenizer: ClassVar[bool] = True

    def words(self) -> str:
        return {
            "tokens": f"spans of text that the {self.model}'s tokens cover too",
            "logp": f"{self.model} log-probs of those spans",
            "single": "which spans are one token on both sides, of the student and the "
            f"{self.model}",
            "vocabulary": f"{self.model} over the whole vocabulary of its own tokenizer",
            "shared": f"whether the {self.model} has the student's tokenizer",
        }[self.what]

    @property
    def read_from(self) -> ReadFrom:
        return "loss" if self.what == "vocabulary" else "step"

    @property
    def bytes_per_token(self) -> int:
        """Counted as one float each, whatever is read."""
        return self.dtype.itemsize

    def made_up(self, rows: int, length: int, vocabulary: int) -> Tensor:  # [B, T] or [B, 1]
        if self.what == "logp":
            return super().made_up(rows, length, vocabulary)
        kind = torch.int64 if self.what == "tokens" else torch.bool
        return torch.ones(rows, 1 if self.what == "shared" else length, dtype=kind)


class Pair(NamedTuple):
    """The other model's distributions at some of the asked positions."""

    at: Tensor | None  # [m] which of them; None: all
    vocabulary: Vocabulary  # [m, V_t]
    match: Match | None


class AlignedSource:
    """A model with a tokenizer of its own, at the student's positions.

    `source` has its distributions at its own flat positions [B * U].
    """

    def __init__(self, source: Any, alignment: Alignment):
        self.source, self.alignment = source, alignment
        self.spans: dict[tuple[str, bool], Spans] = {}
        self.matches: dict[int, Match] = {}

    @property
    def vocabulary(self) -> int:
        """Number of its own vocabulary entries."""
        return self.source.vocabulary

    def logits(self, positions: Tensor) -> Tensor:
        """[n, V] at flat positions [n], of a model with the student's tokenizer."""
        if not self.alignment.shared:
            raise ValueError(
                "logits of a model with another tokenizer are not over the student's ids: read "
                "them with `pairs`"
            )
        return self.source.logits(positions)

    def hidden_at(self, positions: Tensor) -> Tensor:
        """[n, H] at flat positions [n], of a model with the student's tokenizer."""
        if not self.alignment.shared:
            raise ValueError(
                "hidden states of a model with another tokenizer are not at the student's tokens: "
                "use a model with the student's"
            )
        return self.source.hidden_at(positions)

    def still(self, moving: Collection[int]) -> AlignedSource:
        """See `Source.still`."""
        return AlignedSource(self.source.still(moving), self.alignment)

    def pairs(self, positions: Tensor, fact: SpanFact, vocabulary: int) -> list[Pair]:
        """Its distributions [m, V_t] for the spans that end at flat positions [n]; without a merge
        at the student's own tokens, if it shares them.

        vocabulary: number of the student's entries.
        """
        if not fact.merge:
            return [Pair(None, Vocabulary(self.logits(positions)), None)]
        spans = self._spans(fact)
        span = torch.searchsorted(spans.last, positions)
        at = spans.other_last[span] - (
            spans.other_tokens[span] - 1 if fact.merge == "observed" else 0
        )
        return [Pair(None, Vocabulary(self.source.logits(at)), self._match(vocabulary))]

    def _match(self, vocabulary: int) -> Match | None:
        same = self.alignment.same
        if same is not None and vocabulary not in self.matches:
            self.matches[vocabulary] = Match.of(same, vocabulary)
        return self.matches.get(vocabulary)

    def read(self, fact: SpanFact, mask: Tensor) -> Tensor:
        """[B, T], or [B, 1] for "shared": see `SpanFact`.

        Spans with a token outside `mask` are left out.
        """
        if fact.what == "shared":
            return torch.full((len(mask), 1), self.alignment.shared, device=mask.device)
        spans = self._spans(fact)
        trained = torch.nn.functional.pad(mask.flatten().cumsum(0), (1, 0))
        whole = trained[spans.last + 1] - trained[spans.last + 1 - spans.tokens] == spans.tokens
        last, count, end, others = (x[whole] for x in spans)
        if fact.what == "tokens":
            return (
                torch.zeros_like(mask, dtype=torch.int64)
                .flatten()
                .index_put((last,), count)
                .view(mask.shape)
            )
        if fact.what == "single":
            return (
                torch.zeros_like(mask)
                .flatten()
                .index_put((last,), (count == 1) & (others == 1))
                .view(mask.shape)
            )
        owner, back = countdown(others - 1)
        at = end[owner] - back + (fact.merge == "observed")
        logp = self._logp(at, fact.temperature).clamp_min(LOG_FLOOR)
        return logp.new_zeros(mask.numel()).index_add(0, last[owner], logp).view(mask.shape)

    def _spans(self, fact: SpanFact) -> Spans:
        key = fact.merge if fact.merge == "index" else "bytes", fact.eos
        if key not in self.spans:
            self.spans[key] = (by_number if fact.merge == "index" else align)(
                *self.alignment.all_ends(fact.eos)
            )
        return self.spans[key]

    def _logp(self, at: Tensor, temperature: float) -> Tensor:
        """[m]: log-prob of its own tokens at its own flat positions [m]."""
        ids = self.alignment.tokens.flatten()[at]
        with torch.no_grad():
            parts = [
                token_logp(Vocabulary(self.source.logits(at[c])), ids[c], temperature)
                for c in list(slices(len(at), chunk_rows(self.source.vocabulary, at.device)))
                or [slice(0, 0)]
            ]
        return torch.cat(parts)


LOG_FLOOR = math.log(FLOOR)


def token_logp(vocabulary: Vocabulary, ids: Tensor, temperature: float) -> Tensor:
    """[n]: log-probs of ids [n], logits divided by `temperature`."""
    at = (
        vocabulary.at(ids[:, None])
        if temperature == 1
        else vocabulary.logps(temperature).gather(-1, ids[:, None])
    )
    return at[:, 0]


def countdown(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts [n] the rows i and numbers c, c - 1 ... 1 of each: [m], [m]."""
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return owner, counts.cumsum(0)[owner] - torch.arange(len(owner), device=counts.device)
