"""The vocabulary of signals: what a formula can say of a step's tokens and rollouts, without
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.objective.batch import Batch
from opdkit.objective.divergences import Kind, kind_of
from opdkit.objective.facts import (
    ColumnFact,
    EntropyFact,
    GapFact,
    LogpAtFact,
    LogpFact,
    MissingFact,
)
from opdkit.objective.formula import Signal
from opdkit.objective.kernels import divergence_on_support
from opdkit.objective.maths import (
    group_index,
    group_means,
    group_softmax,
    keyed_uniform,
    masked_mean,
    masked_quantile,
    row_mean,
    side_by_side,
    to_go,
)
from opdkit.objective.support import Support

# ---------------------------------------------------------------------------------- what models say


@dataclass(frozen=True)
class Logp(Signal):
    """[B, T]: log pi_model(y_t)."""

    model: str

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        return batch.read(LogpFact(self.model))

    def __str__(self) -> str:
        return f"log {self.model}"


@dataclass(frozen=True)
class LogRatio(Signal):
    """[B, T]: log pi_a(y_t) - log pi_b(y_t), nats."""

    a: str
    b: str

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        return batch.read(LogpFact(self.a)) - batch.read(LogpFact(self.b))

    def __str__(self) -> str:
        return f"log({self.a}/{self.b})"


@dataclass(frozen=True)
class Entropy(Signal):
    """[B, T] nats, over the whole vocabulary."""

    model: str

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        return batch.read(EntropyFact(self.model))


@dataclass(frozen=True)
class Gap(Signal):
    """[B, T] nats: a divergence between student and teacher before this step.

    It does not depend on the sampled token.
    """

    kind: str | Kind = "reverse_kl"
    support: str = "full"
    k: int | None = None
    rest: str = "raw"
    student: str = "student"
    teacher: str = "teacher"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", kind_of(self.kind))
        self.where()

    def where(self) -> Support:
        return Support(self.support, self.k, self.rest, self.student, self.teacher)

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        kind, where = kind_of(self.kind), self.where()
        if where.support == "full":
            return batch.read(GapFact(kind, self.student, self.teacher))
        _, lt = where.entries(batch.read)
        ls = torch.cat(
            [batch.read(LogpAtFact(self.student, owner, self.k or 0)) for owner in where.owners()],
            -1,
        )
        return divergence_on_support(kind, *where.pair(ls, lt))


# ------------------------------------------------------------------------ what is known of rollouts


@dataclass(frozen=True)
class Reward(Signal):
    """[B, 1]: what a rollout is worth; with `name` that one of several rewards, NaN where it does
    not apply.
    """

    name: str = ""

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        named = batch.read(ColumnFact(f"reward:{self.name}")) if self.name else batch.reward
        return named.to(batch.dtype)[:, None]


@dataclass(frozen=True)
class Correct(Signal):
    """[B, 1] bool."""

    def value(self, batch: Batch) -> Tensor:  # [B, 1] bool
        return batch.correct.bool()[:, None]


@dataclass(frozen=True)
class PassRate(Signal):
    """[B, 1] in [0, 1]: how often the student solves a rollout's question.

    What memory holds of the question (kept by `curricula.PassRates`), else the share of correct
    ones among its rollouts of this step, of whatever groups these are.
    """

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        least, mean, _ = group_means(batch.correct.to(batch.dtype), batch.question)
        now = (least + mean)[:, None]
        try:
            # [B, 1], NaN where the prompt is new
            known = batch.read(ColumnFact("memory:pass_rate"))[:, None]
        except MissingFact:  # nothing is remembered yet
            return now
        return torch.where(known.isnan(), now, known.to(now.dtype))


@dataclass(frozen=True)
class Mark(Signal):
    """[B, T] bool: the tokens with a mark, such as "guided" (a teacher's prefix)."""

    name: str

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        return batch.mark(self.name)

    @property
    def marks(self) -> frozenset[str]:
        return frozenset({self.name})


@dataclass(frozen=True)
class Marked(Signal):
    """[B, 1] bool: the rollouts in which a token carries a mark, whoever wrote it."""

    name: str

    def value(self, batch: Batch) -> Tensor:  # [B, 1] bool
        return batch.mark(self.name).any(1, keepdim=True)

    @property
    def marks(self) -> frozenset[str]:
        return frozenset({self.name})


@dataclass(frozen=True)
class Where(Signal):
    """[B, T]: a signal at the tokens that `author` wrote, another at all others."""

    author: str
    of: Signal
    otherwise: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        of, otherwise = (s(batch).to(batch.dtype) for s in (self.of, self.otherwise))
        return torch.where(batch.by((self.author,)), of, otherwise)


@dataclass(frozen=True)
class Row(Signal):
    """[B, 1]: a numeric column of the data; `name[0]` is the first number of a column that holds
    lists, NaN in rows that do not have it.
    """

    name: str

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        return batch.column(self.name).to(batch.dtype)[:, None]


@dataclass(frozen=True)
class Advantage(Signal):
    """[B, 1]: reward, or another number [B, 1], against the other rollouts of its prompt.

    std: (R - mean) / (sample std + 1e-6); mean: R - mean; rloo: R - mean of the others. A group of
    one keeps (R - 0) / 1 under std. Equal rewards have exactly 0.
    """

    normalise: str = "std"
    of: Signal = Reward()

    def __post_init__(self) -> None:
        if self.normalise not in ("std", "mean", "rloo"):
            raise ValueError(
                f"normalise={self.normalise!r} must be one of std, mean, rloo: it is how a reward "
                "becomes an advantage"
            )

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        reward = self.of(batch).to(batch.dtype).expand(len(batch.tokens), 1)[:, 0]
        least, mean, count = group_means(reward, batch.group)
        centred = reward - least - mean
        if self.normalise == "mean":
            return centred[:, None]
        if self.normalise == "rloo":
            return (centred * count / (count - 1).clamp_min(1))[:, None]
        index, n = group_index(batch.group)
        squares = torch.zeros(n, dtype=reward.dtype, device=reward.device).index_add(
            0, index, centred.square()
        )[index]
        spread = (squares / (count - 1).clamp_min(1)).sqrt()
        return torch.where(count > 1, centred / (spread + 1e-6), reward)[:, None]


# ---------------------------------------------------------------------------------------- functions


@dataclass(frozen=True)
class Exp(Signal):
    """exp of a signal."""

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # as `of`: [B, T] or [B, 1]
        return self.of(batch).exp()

    def __str__(self) -> str:
        return f"exp({self.of})"


@dataclass(frozen=True)
class Floor(Signal):
    """A signal, at least `at`."""

    of: Signal
    at: float

    def value(self, batch: Batch) -> Tensor:  # as `of`: [B, T] or [B, 1]
        return self.of(batch).clamp_min(self.at)


@dataclass(frozen=True)
class Ceiling(Signal):
    """A signal, at most `at`."""

    of: Signal
    at: float

    def value(self, batch: Batch) -> Tensor:  # as `of`: [B, T] or [B, 1]
        return self.of(batch).clamp_max(self.at)


@dataclass(frozen=True)
class Draw(Signal):
    """[B, T] bool: true with probability min(of, 1).

    Keyed by (seed, step, rollout, position) and its own formula.
    """

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        return uniform(batch, str(self)) < self.of(batch)

    def __str__(self) -> str:
        return f"Draw({self.of})"


def uniform(batch: Batch, formula: str) -> Tensor:
    """[B, T] uniform draws in [0, 1) for the formula that asks."""
    if batch.uniform is not None:
        return batch.uniform
    return keyed_uniform(batch.seed, batch.step, formula, batch.keys, batch.shape[1], batch.dtype)


@dataclass(frozen=True)
class ToGo(Signal):
    """[B, T]: the discounted sum of a signal over the student's tokens from each of them to the end
    of its response; a tool's take no time.
    """

    of: Signal
    discount: float = 1.0

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        values = self.of(batch).expand(batch.shape)
        return side_by_side(batch.mask, lambda v: to_go(v, self.discount), values)


@dataclass(frozen=True)
class RowMean(Signal):
    """[B, 1]: mean of a signal over a rollout's trained tokens, those `among` them if that is
    given.
    """

    of: Signal
    among: Signal | None = None

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        mask = batch.mask if self.among is None else batch.mask & self.among(batch).bool()
        return row_mean(self.of(batch).expand(batch.shape), mask)


@dataclass(frozen=True)
class GroupMean(Signal):
    """[B, 1]: mean of a signal [B, 1] over the rollouts of each prompt, such as a pass rate,
    GroupMean(Correct()).
    """

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        values = self.of(batch).to(batch.dtype).expand(len(batch.tokens), 1)
        least, mean, _ = group_means(values[:, 0], batch.group)
        return (least + mean)[:, None]


@dataclass(frozen=True)
class MeanOne(Signal):
    """A signal divided by its mean over the trained tokens of the step; 0 where that mean is 0."""

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # as `of`: [B, T] or [B, 1]
        values = self.of(batch).expand(batch.shape).to(batch.dtype)
        mean = masked_mean(values, batch.mask)
        return torch.where(
            mean == 0, torch.zeros_like(values), values / torch.where(mean == 0, 1.0, mean)
        )


@dataclass(frozen=True)
class Quantile(Signal):
    """[1, 1]: the quantile of a signal over the trained tokens of the step; 0 its least, 1 its
    greatest, linear in between.
    """

    of: Signal
    at: float

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        return masked_quantile(self.of(batch).expand(batch.shape), batch.mask, self.at).view(1, 1)


@dataclass(frozen=True)
class GroupShare(Signal):
    """[B, 1]: softmax of `logits` [B, 1] over the rollouts of a prompt for which `among` holds,
    times their number (mean 1).
    """

    logits: Signal
    among: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        logits = self.logits(batch).expand(len(batch.tokens), 1)[:, 0]
        return group_softmax(logits, self.among(batch)[:, 0].bool(), batch.group)[:, None]


@dataclass(frozen=True)
class Progress(Signal):
    """[1, 1]: share of the run that is done, 0 at the first step and 1 at the last."""

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        share = min(max(batch.step / max(batch.total_steps - 1, 1), 0.0), 1.0)
        return torch.full((1, 1), share, dtype=batch.dtype, device=batch.device)


@dataclass(frozen=True)
class Early(Signal):
    """[1, 1] bool: whether this step is among the first `share` of the run's steps; 1: always, 0:
    never.
    """

    share: float

    def value(self, batch: Batch) -> Tensor:  # [1, 1] bool
        # 0.1 * 30 is a little more than 3
        early = batch.step < self.share * batch.total_steps - 1e-9
        return torch.full((1, 1), early, device=batch.device)


def depends_on_sample(signal: Any) -> bool:
    """Whether a signal changes with the sampled token.

    One that does not carries no gradient on average as a credit.
    """
    if isinstance(signal, (Logp, LogRatio, Reward, Correct, Mark, Marked, Row, Advantage)):
        return True
    if isinstance(signal, (Gap, Entropy, Progress)):
        return False
    if isinstance(signal, ToGo) and signal.discount != 0:
        return True  # what comes later follows from it
    if isinstance(signal, tuple):
        return any(map(depends_on_sample, signal))
    inner = list(vars(signal).values()) if isinstance(signal, Signal) else []
    parts = [x for x in inner if isinstance(x, (Signal, tuple))]
    own = isinstance(signal, Signal) and type(signal).__module__ not in (
        __name__,
        "opdkit.objective.formula",
    )
    # a user's own signal without parts may read anything
    return any(map(depends_on_sample, parts)) or (own and not parts)
