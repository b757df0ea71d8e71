"""Losses between distributions over different vocabularies, once per span of text that both
tokenizers divide alike.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.objective import kernels
from opdkit.objective.alignment import LOG_FLOOR, MERGES, Pair, SpanFact, countdown, token_logp
from opdkit.objective.batch import Batch, Live
from opdkit.objective.divergences import JSD, Kind
from opdkit.objective.grammar import TokenLoss
from opdkit.objective.kernels import Vocabulary
from opdkit.objective.kernels.paired import Match, by_rank, by_token, compare


@dataclass(frozen=True)
class SpanLoss(TokenLoss):
    """Compares student and teacher once per span of text, at its last token; both may have
    tokenizers of their own.

    merge: what stands for a span of tokens y_i .. y_j. "bayesian": p_j(.) times the probability of
    y_i .. y_{j-1}, so that its entry at y_j is that of the whole span; "observed": p_i(.) times the
    probability of y_{i+1} .. y_j; "index": the t-th tokens are compared, whatever they cover. The
    factors are at least 1e-8 each and the product is not normalised. Temperatures divide logits.
    eos: whether the ends of sequence are compared too. shared: whether it is defined where the
    teacher has the student's tokenizer.
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
            raise ValueError(
                "student_temperature and teacher_temperature must be positive: they divide logits"
            )

    @abstractmethod
    def compare(
        self, p: Tensor, q: Tensor, rows: slice, match: Match | None, single: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[r] and slope [r, V_s] for p [r, V_s] of the student and q [r, V_t] of the teacher,
        neither normalised: `rows` of n spans.

        single [n] bool: spans of one token on both sides; None unless `parts`.
        """

    @property
    def parts(self) -> bool:
        """Whether spans of one token and longer ones are told apart."""
        return False

    def _fact(self, what: str) -> SpanFact:
        return SpanFact(
            self.teacher,
            what,
            self.merge,
            self.eos,
            self.teacher_temperature if what == "logp" else 1.0,
        )

    def value(self, live: Live) -> Tensor:  # [n]
        base, factor = self.merged(live)
        other, vocabulary = live.read(self._fact("logp")), self._fact("vocabulary")
        values, temperatures = (
            factor.new_zeros(len(factor)),
            (self.student_temperature, self.teacher_temperature),
        )
        single = live.read(self._fact("single")) if self.parts else None
        for index, theirs, match in live.batch.source(self.teacher, vocabulary).pairs(
            live.positions, vocabulary, base.shape[-1]
        ):
            at = slice(None) if index is None else index
            compared = partial(
                self.compare, match=match, single=None if single is None else single[at]
            )
            found = compare(compared, base[at], factor[at], theirs.logits, other[at], temperatures)
            values = found if index is None else values.index_add(0, index, found)
        return values

    def merged(self, live: Live) -> tuple[Tensor, Tensor]:
        """Logits [n, V] of the spans' distributions and the log of what these are multiplied by
        [n], both with gradient.
        """
        count = live.read(self._fact("tokens"))
        zero = live.logits.new_zeros(len(count))
        if not bool((count > 1).any()):
            return live.logits, zero
        owner, steps = countdown(count - 1)
        if self.merge == "observed":
            base, steps = (
                live.back(torch.arange(len(count), device=owner.device), count - 1).logits,
                steps - 1,
            )
        else:
            base = live.logits
        earlier = live.back(owner, steps)
        logp = token_logp(earlier.own, earlier.tokens, self.student_temperature)
        return base, zero.index_add(0, owner, logp.clamp_min(LOG_FLOOR))

    def defined(self, batch: Batch) -> Tensor:  # [B, 1] or [B, T] bool
        ends = batch.read(self._fact("tokens")) > 0
        return ends if self.shared else ends & ~batch.read(SpanFact(self.teacher, "shared"))

    def joined(self, batch: Batch) -> Tensor | None:  # [B, T] bool
        count = batch.read(self._fact("tokens"))
        end = (count > 1).flatten().nonzero()[:, 0]
        if len(end) == 0:
            return None
        owner, back = countdown(count.flatten()[end] - 1)
        return (
            torch.zeros_like(count, dtype=torch.bool)
            .flatten()
            .index_fill(0, end[owner] - back + 1, True)
            .view(count.shape)
        )


@dataclass(frozen=True)
class RankDistance(SpanLoss):
    """sum_k |p^(k) - q^(k)|: the L1 distance of the sorted probabilities, blind to which token has
    them.
    """

    name: ClassVar[str] = "rank_distance"

    def compare(
        self, p: Tensor, q: Tensor, rows: slice, match: Match | None, single: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # [r], [r, V_s]
        return by_rank(p, q)


@dataclass(frozen=True)
class HybridDistance(SpanLoss):
    """A divergence over the tokens that both vocabularies have, and the distance by rank of the
    others:

        w_m sum_{v in both} D(p(v), q(v)) + w_u sum_k |p^(k) - q^(k)|

    `weights` are (w_m, w_u); None: the share of the teacher's tokens that the student has, and the
    rest. `longer`: how spans are compared that are several tokens on a side, where the entry of a
    token stands for different texts: "token", as all others, or "rank", as if no token were in
    both.
    """

    kind: Kind = JSD()
    weights: tuple[float, float] | None = None
    longer: str = "token"
    name: ClassVar[str] = "hybrid_distance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longer not in ("token", "rank"):
            raise ValueError(
                f"longer={self.longer!r} must be 'token' or 'rank': how spans of several tokens "
                "are compared"
            )

    @property
    def parts(self) -> bool:
        return self.longer == "rank"

    def compare(
        self, p: Tensor, q: Tensor, rows: slice, match: Match | None, single: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # [r], [r, V_s]
        if match is None:
            raise ValueError(
                "which tokens the two vocabularies have in common is not known: give "
                "Alignment.same, the student's id of each of the teacher's"
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
        """[r] and slope [r, V_s]: both sums, for p [r, V_s] and q [r, V_t]."""
        (matched, rest), value, slope = (
            self._weights(match),
            p.new_zeros(len(p)),
            torch.zeros_like(p),
        )
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

    def defined(self, batch: Batch) -> Tensor:  # [B, 1] bool
        return batch.read(SpanFact(self.teacher, "shared"))

    def value(self, live: Live) -> Tensor:  # [n]
        fact, values = (
            SpanFact(self.teacher, "vocabulary"),
            live.logits.new_zeros(len(live.positions)),
        )
        if bool(self.defined(live.batch).all()):
            pairs = [Pair(None, live.vocabulary(self.teacher, fact), None)]
        else:
            pairs = live.batch.source(self.teacher, fact).pairs(
                live.positions, fact, live.logits.shape[-1]
            )
        for index, vocabulary, _ in pairs:
            mine = live.own if index is None else live.own.select(index)
            found = kernels.divergence(
                self.kind,
                cooled(mine, self.student_temperature),
                cooled(vocabulary, self.teacher_temperature),
            )
            values = found if index is None else values.index_add(0, index, found)
        return values


def cooled(vocabulary: Vocabulary, temperature: float) -> Vocabulary:
    return vocabulary if temperature == 1 else Vocabulary(vocabulary.logits / temperature)
