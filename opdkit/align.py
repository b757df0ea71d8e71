"""Two tokenizers on one text: which of their tokens cover the same bytes, and losses between distributions over different vocabularies.

A *span* is the shortest stretch of text at whose end both tokenizers have a token end. A loss compares one pair of distributions per
span, at the last of the student's tokens in it; where both have one token there, these are the two models' next-token distributions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from opdkit import kernels
from opdkit.head import chunk_rows, slices
from opdkit.kernels import Vocabulary
from opdkit.kernels.paired import FLOOR, Match, by_rank, by_token, compare
from opdkit.maths import JSD, Kind
from opdkit.objective import TokenLoss
from opdkit.types import Batch, Live, SpanFact

MERGES = ("bayesian", "observed", "index")
OUT, EOS = -1, -2  # in place of a token's end


# --------------------------------------------------------------------------------------------------------------- alignment


@dataclass(frozen=True, eq=False)
class Alignment:
    """How another tokenizer divides the same responses.

    Ends are the byte of the UTF-8 text at which a token ends, counted from the start of the response; `EOS` at the end of sequence, which
    is no text; `OUT` where a token is left out (padding). `same` holds for each of its tokens the id of the student's with the same text,
    -1 where there is none; what a head has beyond that only pads it. `shared`: it is the student's tokenizer, on the student's very tokens.
    """

    tokens: Tensor  # [B, U] ids of the other tokenizer
    student_ends: Tensor  # [B, T]
    ends: Tensor  # [B, U]
    same: Tensor | None = None  # [V_t]
    shared: bool = False

    def all_ends(self, eos: bool) -> tuple[Tensor, Tensor]:
        """Ends on both sides; with `eos` the end of sequence ends one byte after the text, else it is out."""
        both = []
        for ends in (self.student_ends, self.ends):
            behind = ends.amax(1, keepdim=True).clamp_min(0) + 1 if eos and ends.shape[1] else OUT
            both.append(torch.where(ends == EOS, behind, ends))
        return both[0], both[1]


class Spans(NamedTuple):
    """N spans: the flat index of the last token of each on either side, and how many tokens it has there."""

    last: Tensor  # [N] in [B * T]
    tokens: Tensor  # [N]
    other_last: Tensor  # [N] in [B * U]
    other_tokens: Tensor  # [N]


def align(student_ends: Tensor, ends: Tensor) -> Spans:
    """The spans of token ends [B, T] and [B, U], row by row.

    Walk both lists, always on the side that ends earlier; where both end at the same byte a span closes. What is left of a row makes a
    last span if both sides have some of it.
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
        begin = torch.maximum(before + 1, side.first[side.row[at]])  # not what the row above has left
        found += [side.flat[at], at - begin + 1]
    return Spans(*found)


class _Side(NamedTuple):
    """The tokens of one side that have an end, row after row."""

    flat: Tensor  # [n] index in the table
    row: Tensor  # [n]
    keys: Tensor  # [n] equal on both sides where the same byte of the same row ends, for the first, second ... time
    first: Tensor  # [B] place in these lists of each row's first token
    final: Tensor  # places of the rows' last tokens

    @staticmethod
    def of(ends: Tensor, *both: Tensor) -> _Side:
        flat = (ends >= 0).flatten().nonzero()[:, 0]
        row = flat // max(ends.shape[1], 1)
        bytes_ = 2 + max((int(x.max()) for x in both if x.numel()), default=0)
        keys = row * bytes_ + ends.flatten()[flat]
        place = torch.arange(len(keys), device=ends.device)
        again = place - torch.searchsorted(keys, keys)  # tokens without bytes end where the one before did
        first = torch.searchsorted(row, torch.arange(len(ends), device=ends.device))
        final = (torch.searchsorted(row, row, right=True) - 1 == place).nonzero()[:, 0]
        return _Side(flat, row, keys * (1 + max(x.shape[1] for x in both)) + again, first, final)


def by_number(student_ends: Tensor, ends: Tensor) -> Spans:
    """The t-th token of each row with the other side's t-th, as far as both go: spans of one token, whatever their text."""
    width = min(student_ends.shape[1], ends.shape[1])
    row, column = ((student_ends[:, :width] >= 0) & (ends[:, :width] >= 0)).nonzero(as_tuple=True)
    one = torch.ones_like(row)
    return Spans(row * student_ends.shape[1] + column, one, row * ends.shape[1] + column, one)


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
            raise ValueError("logits of a model with another tokenizer are not over the student's ids: read them with `pairs`")
        return self.source.logits(positions)

    def pairs(self, positions: Tensor, fact: SpanFact, vocabulary: int) -> list[Pair]:
        """Its distributions for the spans that end at flat positions [n]; without a merge at the student's own tokens, if it shares them.

        vocabulary: number of the student's entries.
        """
        if not fact.merge:
            return [Pair(None, Vocabulary(self.logits(positions)), None)]
        spans = self._spans(fact)
        span = torch.searchsorted(spans.last, positions)
        at = spans.other_last[span] - (spans.other_tokens[span] - 1 if fact.merge == "observed" else 0)
        return [Pair(None, Vocabulary(self.source.logits(at)), self._match(vocabulary))]

    def _match(self, vocabulary: int) -> Match | None:
        same = self.alignment.same
        if same is not None and vocabulary not in self.matches:
            self.matches[vocabulary] = Match.of(same, vocabulary)
        return self.matches.get(vocabulary)

    def read(self, fact: SpanFact, mask: Tensor) -> Tensor:
        """[B, T], or [B, 1] for "shared": see `SpanFact`. Spans with a token outside `mask` are left out."""
        if fact.what == "shared":
            return torch.full((len(mask), 1), self.alignment.shared, device=mask.device)
        spans = self._spans(fact)
        trained = torch.nn.functional.pad(mask.flatten().cumsum(0), (1, 0))
        whole = trained[spans.last + 1] - trained[spans.last + 1 - spans.tokens] == spans.tokens
        last, count, end, others = (x[whole] for x in spans)
        if fact.what == "tokens":
            return torch.zeros_like(mask, dtype=torch.int64).flatten().index_put((last,), count).view(mask.shape)
        if fact.what == "single":
            return torch.zeros_like(mask).flatten().index_put((last,), (count == 1) & (others == 1)).view(mask.shape)
        owner, back = countdown(others - 1)
        at = end[owner] - back + (fact.merge == "observed")
        logp = self._logp(at, fact.temperature).clamp_min(LOG_FLOOR)
        return logp.new_zeros(mask.numel()).index_add(0, last[owner], logp).view(mask.shape)

    def _spans(self, fact: SpanFact) -> Spans:
        key = fact.merge if fact.merge == "index" else "bytes", fact.eos
        if key not in self.spans:
            self.spans[key] = (by_number if fact.merge == "index" else align)(*self.alignment.all_ends(fact.eos))
        return self.spans[key]

    def _logp(self, at: Tensor, temperature: float) -> Tensor:
        """[m]: log-prob of its own tokens at its own flat positions [m]."""
        ids = self.alignment.tokens.flatten()[at]
        with torch.no_grad():
            parts = [
                token_logp(Vocabulary(self.source.logits(at[c])), ids[c], temperature)
                for c in list(slices(len(at), chunk_rows(self.source.vocabulary, at.device))) or [slice(0, 0)]
            ]
        return torch.cat(parts)


LOG_FLOOR = math.log(FLOOR)


def token_logp(vocabulary: Vocabulary, ids: Tensor, temperature: float) -> Tensor:
    """[n]: log-probs of ids [n], logits divided by `temperature`."""
    at = vocabulary.at(ids[:, None]) if temperature == 1 else vocabulary.logps(temperature).gather(-1, ids[:, None])
    return at[:, 0]


def countdown(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts [n] the rows i and numbers c, c - 1 ... 1 of each: [m], [m]."""
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return owner, counts.cumsum(0)[owner] - torch.arange(len(owner), device=counts.device)


# ------------------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class SpanLoss(TokenLoss):
    """Compares student and teacher once per span of text, at its last token; both may have tokenizers of their own.

    merge: what stands for a span of tokens y_i .. y_j. "bayesian": p_j(.) times the probability of y_i .. y_{j-1}, so that its entry at y_j
    is that of the whole span; "observed": p_i(.) times the probability of y_{i+1} .. y_j; "index": the t-th tokens are compared,
    whatever they cover. The factors are at least 1e-8 each and the product is not normalised. Temperatures divide logits.
    eos: whether the ends of sequence are compared too. shared: whether it is defined where the teacher has the student's tokenizer.
    """

    merge: str = "bayesian"
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    eos: bool = False
    shared: bool = True
    teacher: str = "teacher"

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise ValueError(f"merge={self.merge!r} must be one of {', '.join(MERGES)}")
        if min(self.student_temperature, self.teacher_temperature) <= 0:
            raise ValueError("student_temperature and teacher_temperature must be positive: they divide logits")

    @abstractmethod
    def compare(self, p: Tensor, q: Tensor, rows: slice, match: Match | None, single: Tensor | None) -> tuple[Tensor, Tensor]:
        """[r] and slope [r, V_s] for p [r, V_s] of the student and q [r, V_t] of the teacher, neither normalised: `rows` of n spans.

        single [n] bool: spans of one token on both sides; None unless `parts`.
        """

    @property
    def parts(self) -> bool:
        """Whether spans of one token and longer ones are told apart."""
        return False

    def _fact(self, what: str) -> SpanFact:
        return SpanFact(self.teacher, what, self.merge, self.eos, self.teacher_temperature if what == "logp" else 1.0)

    def value(self, live: Live) -> Tensor:
        base, factor = self.merged(live)
        other, vocabulary = live.read(self._fact("logp")), self._fact("vocabulary")
        values, temperatures = factor.new_zeros(len(factor)), (self.student_temperature, self.teacher_temperature)
        single = live.read(self._fact("single")) if self.parts else None
        for index, theirs, match in live.batch.source(self.teacher, vocabulary).pairs(live.positions, vocabulary, base.shape[-1]):
            at = slice(None) if index is None else index
            compared = partial(self.compare, match=match, single=None if single is None else single[at])
            found = compare(compared, base[at], factor[at], theirs.logits, other[at], temperatures)
            values = found if index is None else values.index_add(0, index, found)
        return values

    def merged(self, live: Live) -> tuple[Tensor, Tensor]:
        """Logits [n, V] of the spans' distributions and the log of what these are multiplied by [n], both with gradient."""
        count = live.read(self._fact("tokens"))
        zero = live.logits.new_zeros(len(count))
        if not bool((count > 1).any()):
            return live.logits, zero
        owner, steps = countdown(count - 1)
        if self.merge == "observed":
            base, steps = live.back(torch.arange(len(count), device=owner.device), count - 1).logits, steps - 1
        else:
            base = live.logits
        earlier = live.back(owner, steps)
        logp = token_logp(earlier.own, earlier.tokens, self.student_temperature)
        return base, zero.index_add(0, owner, logp.clamp_min(LOG_FLOOR))

    def defined(self, batch: Batch) -> Tensor:
        ends = batch.read(self._fact("tokens")) > 0
        return ends if self.shared else ends & ~batch.read(SpanFact(self.teacher, "shared"))

    def joined(self, batch: Batch) -> Tensor | None:
        count = batch.read(self._fact("tokens"))
        end = (count > 1).flatten().nonzero()[:, 0]
        if len(end) == 0:
            return None
        owner, back = countdown(count.flatten()[end] - 1)
        return torch.zeros_like(count, dtype=torch.bool).flatten().index_fill(0, end[owner] - back + 1, True).view(count.shape)


@dataclass(frozen=True)
class RankDistance(SpanLoss):
    """sum_k |p^(k) - q^(k)|: the L1 distance of the sorted probabilities, blind to which token has them."""

    name: ClassVar[str] = "rank_distance"

    def compare(self, p: Tensor, q: Tensor, rows: slice, match: Match | None, single: Tensor | None) -> tuple[Tensor, Tensor]:
        return by_rank(p, q)


@dataclass(frozen=True)
class HybridDistance(SpanLoss):
    """A divergence over the tokens that both vocabularies have, and the distance by rank of the others:

        w_m sum_{v in both} D(p(v), q(v)) + w_u sum_k |p^(k) - q^(k)|

    `weights` are (w_m, w_u); None: the share of the teacher's tokens that the student has, and the rest. `longer`: how spans are compared
    that are several tokens on a side, where the entry of a token stands for different texts: "token", as all others, or "rank", as if
    no token were in both.
    """

    kind: Kind = JSD()
    weights: tuple[float, float] | None = None
    longer: str = "token"
    name: ClassVar[str] = "hybrid_distance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longer not in ("token", "rank"):
            raise ValueError(f"longer={self.longer!r} must be 'token' or 'rank': how spans of several tokens are compared")

    @property
    def parts(self) -> bool:
        return self.longer == "rank"

    def compare(self, p: Tensor, q: Tensor, rows: slice, match: Match | None, single: Tensor | None) -> tuple[Tensor, Tensor]:
        if match is None:
            raise ValueError(
                "which tokens the two vocabularies have in common is not known: give Alignment.same, the student's id of each of the teacher's"
            )
        single = None if single is None else single[rows]
        if single is None or bool(single.all()):
            return self._hybrid(p, q, match)
        value, slope = p.new_empty(len(p)), torch.empty_like(p)
        value[single], slope[single] = self._hybrid(p[single], q[single], match)
        rank, of = by_rank(p[~single], q[~single])
        rest = self._weights(match)[1]
        value[~single], slope[~single] = rest * rank, rest * of
        return value, slope

    def _weights(self, match: Match) -> tuple[float, float]:
        return self.weights or (match.share, 1 - match.share)

    def _hybrid(self, p: Tensor, q: Tensor, match: Match) -> tuple[Tensor, Tensor]:
        (matched, rest), value, slope = self._weights(match), p.new_zeros(len(p)), torch.zeros_like(p)
        if len(match.student):
            part, of = by_token(self.kind, p[:, match.student], q[:, match.teacher])
            value += matched * part
            slope[:, match.student] = matched * of
        if len(match.student_rest) and len(match.teacher_rest):
            part, of = by_rank(p[:, match.student_rest], q[:, match.teacher_rest])
            value += rest * part
            slope[:, match.student_rest] = rest * of
        return value, slope


@dataclass(frozen=True)
class SharedDivergence(TokenLoss):
    """A divergence over the full vocabulary, where the teacher has the student's tokenizer."""

    kind: Kind = JSD()
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    teacher: str = "teacher"
    name: ClassVar[str] = "shared_divergence"

    def defined(self, batch: Batch) -> Tensor:
        return batch.read(SpanFact(self.teacher, "shared"))

    def value(self, live: Live) -> Tensor:
        fact, values = SpanFact(self.teacher, "vocabulary"), live.logits.new_zeros(len(live.positions))
        if bool(self.defined(live.batch).all()):
            pairs = [Pair(None, live.vocabulary(self.teacher, fact), None)]
        else:
            pairs = live.batch.source(self.teacher, fact).pairs(live.positions, fact, live.logits.shape[-1])
        for index, vocabulary, _ in pairs:
            mine = live.own if index is None else live.own.select(index)
            found = kernels.divergence(
                self.kind, cooled(mine, self.student_temperature), cooled(vocabulary, self.teacher_temperature)
            )
            values = found if index is None else values.index_add(0, index, found)
        return values


def cooled(vocabulary: Vocabulary, temperature: float) -> Vocabulary:
    return vocabulary if temperature == 1 else Vocabulary(vocabulary.logits / temperature)
