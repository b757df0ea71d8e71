"""The facts of one step and the live student: what signals and losses are handed.

Shapes: B rollouts, T response positions (column 0 is the first response token; rows are padded on
the right), V vocabulary entries. Log-probabilities, entropies and divergences are in nats.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.objective.companion import Companion, Companions
from opdkit.objective.facts import (
    ColumnFact,
    EntropyFact,
    Fact,
    LogpAtFact,
    LogpFact,
    MissingFact,
    ReadFrom,
    VocabularyFact,
)
from opdkit.objective.kernels import Vocabulary
from opdkit.types import MARK_OF

if TYPE_CHECKING:
    from opdkit.objective.formula import Signal


# of a signal that makes two steps in one
JOINED = (
    "a number of several rollouts (a mean, a quantile, a rank, the state of a companion) is made "
    "from a fact with several numbers per token, such as log-probs at a top k, of which each "
    "process has its own tokens' only. Make it in two signals: one of a number per token or "
    "rollout from the fact, which is then put together from all processes, and another that takes "
    "the mean of that (MeanOne, Quantile, or your own)"
)


class Batch:
    """Facts about the rollouts of one step, none with a gradient.

    Reading an absent one raises `MissingFact`, which says how to supply it.

    Arguments:
        tokens: [B, T] int64: the responses, padded on the right.
        trained: [B, T] bool: the tokens that may be learnt from, whoever wrote them.
        facts: tensors by fact: [B, T], [B, T, k], or [B] for columns.
        sources: by model, the whole vocabulary of those in this process (see `head.Source`).
        keys: [B] int64: hash of each rollout's id, which keyed draws depend on.
        step, total_steps: of the run, for schedules.
        seed: of the run, for keyed draws.
        uniform: [B, T] in [0, 1): replaces the keyed draws.
        memory: what the method's curriculum remembers, by name.
        mine: [B, T] bool: the tokens that this process has facts [B, T, k] of; None: all.
        whole: makes what every process found of its own tokens the whole, by a sum; see `shared`.
        drawn: whether the sampler's log-probs are those of the distribution that tokens were drawn
            from (temperature, cuts, a teacher's share), not of its plain softmax.
        dtype: of numbers that signals compute in.

    >>> from opdkit.objective.facts import LogpFact
    >>> facts = {LogpFact("teacher"): torch.tensor([[-1.0, -0.5]])}
    >>> facts |= {LogpFact("student"): torch.tensor([[-2.0, -0.5]])}
    >>> batch = Batch(torch.tensor([[8, 2]]), torch.tensor([[True, True]]), facts)
    >>> (batch["teacher"].logp - batch["student"].logp).tolist()
    [[1.0, 0.0]]
    """

    def __init__(
        self,
        tokens: Tensor,
        trained: Tensor,
        facts: Mapping[Fact, Tensor] | None = None,
        sources: Mapping[str, Any] | None = None,
        keys: Tensor | None = None,
        step: int = 0,
        total_steps: int = 1,
        seed: int = 0,
        uniform: Tensor | None = None,
        memory: Mapping[str, Any] | None = None,
        drawn: bool = False,
        mine: Tensor | None = None,
        whole: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.tokens, self.trained = tokens, trained
        self.facts: dict[Fact, Tensor] = dict(facts or {})
        self.sources: dict[str, Any] = dict(sources or {})
        self.keys = torch.arange(len(tokens), device=tokens.device) if keys is None else keys
        self.step, self.total_steps, self.seed = step, total_steps, seed
        self.uniform = uniform
        self.memory = dict(memory or {})
        self.drawn = drawn
        self.mine, self.whole = mine, whole
        # whether the student that learns may be another than the one before the step: until its
        # first update it is not, unless something disturbs the passes in which it learns
        self.moved = True
        # whether what is being computed has read facts of this process's own tokens alone
        self.partial = False
        self.dtype = dtype
        self.companions = Companions()  # what stands beside the student, as it is now
        # values of the step's signals, each computed once
        self.signals: dict[Signal, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def shape(self) -> torch.Size:
        return self.tokens.shape

    @property
    def mask(self) -> Tensor:
        """[B, T] bool: the trained tokens that the student drew: what signals look at."""
        return self.by(("student",))

    def by(self, authors: Collection[str]) -> Tensor:
        """[B, T] bool: the trained tokens that one of `authors` (see `types.AUTHORS`) wrote."""
        marked = {a: self.facts.get(ColumnFact(f"mark:{mark}")) for a, mark in MARK_OF.items()}
        found = self.trained
        for author, where in marked.items():
            if where is not None and author not in authors:
                found = found & ~where
        if "student" not in authors:
            others = [where for a in authors if (where := marked[a]) is not None]
            found = found & reduce(operator.or_, others, torch.zeros_like(found))
        return found

    def read(self, fact: Fact) -> Tensor:
        """[B, T] or [B, T, k], a column [B]: the tensor of a fact, detached."""
        if fact not in self.facts:
            raise self.missing(fact)
        self.partial |= len(fact.shape) > 0
        return self.facts[fact]

    def shared(self, value: Tensor) -> Tensor:
        """[B, T] or [B, 1]: a value that was made of facts [B, T, k], of which a process holds
        those of its own tokens, as all processes together have it.
        """
        if self.mine is None or self.whole is None:
            return value
        if value.shape[0] != self.shape[0]:
            raise self.joined
        mine = self.mine if value.shape[1] == self.shape[1] else self.mine.any(1, keepdim=True)
        joined = self.whole(torch.where(mine, value, torch.zeros_like(value)).to(self.dtype))
        return joined.to(value.dtype)

    @property
    def divided(self) -> bool:
        """Whether both this process and others have tokens to learn from."""
        if self.mine is None:
            return False
        return all(bool((self.trained & own).any()) for own in (self.mine, ~self.mine))

    def refuse_joined(self, value: Tensor, make: Callable[[Batch], Tensor]) -> None:
        """Refuses to make a value [B, T] or [B, 1] of this process's tokens of numbers [B, T, k] of
        others' tokens, which it does not have: with other numbers there it may not change.
        """
        assert self.mine is not None
        there, other = ~self.mine[..., None], copy.copy(self)
        other.facts = {
            fact: torch.where(there, -50.0 if x.is_floating_point() else x.amax(), x)
            if fact.shape and x.numel()
            else x
            for fact, x in self.facts.items()
        }
        again = make(other)
        if value.shape[0] == self.shape[0]:
            mine = self.mine if value.shape[1] == self.shape[1] else self.mine.any(1, keepdim=True)
            value, again = value[mine].double(), again[mine].double()
            if bool(torch.isclose(value, again, rtol=1e-4, equal_nan=True).all()):
                return
        raise self.joined

    @property
    def joined(self) -> UserError:
        """The error for a number of several rollouts from what a process has of its own alone."""
        return UserError(JOINED)

    def __getitem__(self, model: str) -> Scores:
        return Scores(self, model)

    @property
    def reward(self) -> Tensor:
        """[B] float."""
        return self.read(ColumnFact("reward"))

    @property
    def rewards(self) -> dict[str, Tensor]:
        """[B] float each: the rewards that have names, NaN for rollouts that one does not apply
        to.
        """
        columns = {fact.words(): x for fact, x in self.facts.items()}
        names = sorted(name for name in columns if name.startswith("reward:"))
        return {name.partition(":")[2]: columns[name] for name in names}

    @property
    def correct(self) -> Tensor:
        """[B] bool."""
        return self.read(ColumnFact("correct"))

    @property
    def group(self) -> Tensor:
        """[B] int64: equal for rollouts that are compared with each other."""
        return self.read(ColumnFact("group"))

    @property
    def question(self) -> Tensor:
        """[B] int64: equal for rollouts that answer the same question; where it is not said, the
        group's.
        """
        known = self.facts.get(ColumnFact("question"))
        return self.group if known is None else known

    @property
    def turn(self) -> Tensor:
        """[B, T] int64: the turn of each token, from 0."""
        return self.facts.get(ColumnFact("turn"), torch.zeros_like(self.tokens))

    def mark(self, name: str) -> Tensor:
        """[B, T] bool: the tokens that carry a mark; none where no rollout of the step has it."""
        return self.facts.get(ColumnFact(f"mark:{name}"), torch.zeros_like(self.trained))

    def column(self, name: str) -> Tensor:
        """[B] numbers from a column of the data rows."""
        return self.read(ColumnFact(f"row:{name}"))

    def source(self, model: str, fact: Fact | None = None) -> Any:
        """The whole vocabulary of a model in this process, read as `fact` (default: over the
        student's own ids).
        """
        if model not in self.sources:
            raise self.missing(fact or VocabularyFact(model))
        return self.sources[model]

    def still(self, moving: Iterable[Tensor]) -> None:
        """Keeps the vocabularies of models as they are when the tensors `moving` [...], of which
        some are their heads, are moved by an optimiser step; the live student is read anew then. A
        source of one's own that has no `still` is left as it is.
        """
        where = {tensor.data_ptr() for tensor in moving}
        for name, source in self.sources.items():
            if name != "live" and hasattr(source, "still"):
                self.sources[name] = source.still(where)

    def companion(self, companion: Companion) -> Any:
        """The state of a companion."""
        if companion not in self.companions:
            raise LookupError(
                f"{companion} is not there: companions are found by running the formula once. One "
                "that only a fact reads has to be a field of the fact, or in its `companions`"
            )
        return self.companions[companion]

    def missing(self, fact: Fact) -> MissingFact:
        """The error for a fact that is not there."""
        known = {m for f in self.facts for m in f.models[:1]} | set(self.sources)
        return MissingFact(fact.missing(known))


@dataclass(frozen=True)
class Scores:
    """What one model (student, sampler, teacher, reference, any other name) says of the step's
    tokens.
    """

    batch: Batch
    model: str

    @property
    def logp(self) -> Tensor:
        """[B, T]: log-prob of the sampled tokens."""
        return self.batch.read(LogpFact(self.model))

    @property
    def entropy(self) -> Tensor:
        """[B, T] nats, over the whole vocabulary."""
        return self.batch.read(EntropyFact(self.model))

    def at_top(self, owner: str, k: int) -> Tensor:
        """[B, T, k]: this model's log-probs at the top-k ids of `owner`."""
        return self.batch.read(LogpAtFact(self.model, owner, k))


@dataclass(frozen=True)
class HiddenFact(Fact):
    """The model's last hidden states at any position: a model in this process."""

    model: str

    def words(self) -> str:
        return f"{self.model} hidden states"

    @property
    def read_from(self) -> ReadFrom:
        return "loss"


class Live:
    """The student's forward pass at n selected positions: the only thing with a gradient.

    Exists inside one chunk of the head's pass.
    """

    def __init__(
        self,
        batch: Batch,
        positions: Tensor,  # [n] indices into the flattened [B * T]
        logits: Tensor,  # [n, V]
        parent: tuple[Live, Tensor] | None = None,
        hidden: Callable[[], Tensor] | None = None,  # [n, H], where there is a gradient
    ):
        self.batch = batch
        self.positions = positions
        self.parent = parent
        self._hidden = hidden
        self.own: Vocabulary = Vocabulary(
            logits, None if parent is None else (parent[0].own, parent[1])
        )
        self.others: dict[str, Vocabulary] = {}
        self.looked: dict[str, Tensor] = {}  # [n] bool by model: where a term read its vocabulary

    @property
    def logits(self) -> Tensor:
        """[n, V]."""
        return self.own.logits

    @cached_property
    def logp(self) -> Tensor:
        """[n]: log pi_s of the sampled token."""
        return self.at(self.tokens[:, None])[:, 0]

    @cached_property
    def tokens(self) -> Tensor:
        """[n]: the sampled tokens."""
        return self.batch.tokens.flatten()[self.positions]

    @cached_property
    def entropy(self) -> Tensor:
        """[n] nats."""
        logps = self.logps()
        return -(logps.exp() * torch.nan_to_num(logps, neginf=0.0)).sum(-1)

    @cached_property
    def hidden(self) -> Tensor:
        """[n, H]: the student's last hidden states, which the head turns into logits."""
        if self.parent is not None:
            parent, index = self.parent
            return parent.hidden[index]
        if self._hidden is None:
            raise LookupError(
                "the live student's hidden states exist in a loss only; a fact reads those before "
                "the step, here.hidden_of('student')"
            )
        return self._hidden()

    def at(self, ids: Tensor) -> Tensor:
        """[n, k]: log pi_s at token ids [n, k]."""
        return self.own.at(ids)

    def logps(self, temperature: float = 1.0) -> Tensor:
        """[n, V]: log pi_s over the whole vocabulary, logits divided by `temperature`."""
        return self.own.logps(temperature)

    def vocabulary(self, model: str, fact: Fact | None = None) -> Vocabulary:
        """The whole vocabulary of another model in this process, no gradient; shared by all terms
        of a chunk. `fact`: see `Batch.source`.
        """
        self._look(model)
        return self._vocabulary(model, fact)

    def _vocabulary(self, model: str, fact: Fact | None) -> Vocabulary:
        """[n, V], as `vocabulary` has it; of a selection, some rows of its whole chunk's."""
        if model not in self.others:
            if self.parent is None:
                self.others[model] = Vocabulary(
                    self.batch.source(model, fact).logits(self.positions)
                )
            else:
                parent, index = self.parent
                self.others[model] = parent._vocabulary(model, fact).select(index)
        return self.others[model]

    def _look(self, model: str) -> None:
        """Notes in the chunk at which of its positions a model is read."""
        chunk, at = self, torch.arange(len(self.positions), device=self.positions.device)
        while chunk.parent is not None:
            chunk, index = chunk.parent
            at = index[at]
        if model not in chunk.looked:
            chunk.looked[model] = torch.zeros_like(chunk.positions, dtype=torch.bool)
        chunk.looked[model][at] = True

    def hidden_of(self, model: str) -> Tensor:
        """[n, H]: last hidden states of another model in this process, or of the student before
        the step; no gradient.
        """
        source = self.batch.source(model, HiddenFact(model))
        if not hasattr(source, "hidden_at"):
            raise LookupError(
                f"{model} is put together from several models, which have no hidden states in "
                "common: read those of one model in this process"
            )
        return source.hidden_at(self.positions).to(self.batch.dtype)

    def companion(self, companion: Companion) -> Any:
        """The state of a companion; its parameters take part in the gradient."""
        return self.batch.companion(companion)

    def pick(self, signal: Any) -> Tensor:
        """[n]: a signal of the whole step, at these positions."""
        return signal(self.batch).expand(self.batch.shape).flatten()[self.positions]

    def read(self, fact: Fact) -> Tensor:
        """[n] or [n, k]: a fact [B, T] or [B, T, k] at these positions."""
        return self.batch.read(fact).flatten(0, 1)[self.positions]

    def select(self, index: Tensor) -> Live:
        """The pass at some of these positions, by their index [m] in [n]."""
        return Live(self.batch, self.positions[index], self.logits[index], (self, index))

    def back(self, index: Tensor, steps: Tensor) -> Live:
        """The pass `steps` [m] positions before those at `index` [m], selected or not.

        They have to be in the same chunk: a loss that reads them says so (`TokenLoss.joined`).
        """
        chunk, at = self, index
        while chunk.parent is not None:
            chunk, inner = chunk.parent
            at = inner[at]
        at = at - steps
        if bool((chunk.positions[at.clamp_min(0)] != self.positions[index] - steps).any()):
            raise ValueError(
                "a loss reads positions outside its chunk: it must name them in `joined`"
            )
        return chunk.select(at)
