"""What flows through a run: prompts, rollouts, and the facts of one step.

Shapes: B rollouts, T response positions (column 0 is the first response token; rows are padded on the right),
V vocabulary entries. Log-probabilities, entropies and divergences are in nats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdkit.kernels import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Hashable

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One question as token ids, with the data row it came from."""

    id: str
    tokens: list[int]
    row: Row = field(default_factory=dict)
    prefix: list[int] = field(default_factory=list)  # response tokens written for the student (a teacher prefix)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Names as in transformers and TRL."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    max_completion_length: int = 512
    num_generations: int = 1  # responses per prompt
    stop: tuple[str, ...] = ()  # stop strings, besides the end-of-sequence tokens

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's own softmax, nothing scaled or cut."""
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0


@dataclass(frozen=True)
class Rollout:
    """One response and its provenance, before tensors: crosses process borders, caches and logs."""

    id: str  # unique in the run, stable over resume, order and sharding: it keys the random signals
    prompt: list[int]
    tokens: list[int]  # the response, with its end-of-sequence token if it wrote one
    trained: list[bool]  # False: tool output, user turns, anything the student did not choose
    logp: list[float]  # log-prob of each token under the sampler's plain softmax (temperature 1, nothing cut)
    drawn_logp: list[float]  # under the distribution it was drawn from (temperature, top_p, top_k, min_p)
    group: str  # the prompt: rollouts of one group answer the same question
    policy_version: int = 0  # optimiser steps the sampling policy had taken
    finish: str = "stop"  # "stop": it ended itself; "length": cut at max_completion_length; "given": read from data
    text: str = ""
    reward: float | None = None
    correct: bool | None = None
    marks: dict[str, list[bool]] = field(default_factory=dict)  # named sets of tokens, such as "guided"
    row: Row = field(default_factory=dict)
    notes: Notes | None = field(default=None, compare=False, repr=False)  # what else the sampler saw at each token


@dataclass(frozen=True)
class Notes:
    """What a sampler saw of its own distribution at each token of a rollout, where it was asked to look: see `Watch`."""

    entropy: Tensor | None  # [T] nats
    top: Tensor | None  # [T, k] int64: ids of the most probable tokens, most probable first
    top_logp: Tensor | None  # [T, k]: their log-probs


@dataclass(frozen=True)
class Watch:
    """What a sampler is to note at each token, under the plain softmax: no pass of the student has to find it out again."""

    entropy: bool = False
    top: int = 0  # how many of the most probable tokens, with their log-probs


# ---------------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class LogpFact:
    """[B, T]: log pi_model(y_t)."""

    model: str


@dataclass(frozen=True)
class EntropyFact:
    """[B, T]: entropy of pi_model over the whole vocabulary."""

    model: str


@dataclass(frozen=True)
class TopFact:
    """[B, T, k] int: ids of the k most probable tokens of a model, most probable first."""

    model: str
    k: int


@dataclass(frozen=True)
class LogpAtFact:
    """[B, T, k]: log pi_model at the top-k ids of `owner`; normalised over the whole vocabulary."""

    model: str
    owner: str
    k: int


@dataclass(frozen=True)
class GapFact:
    """[B, T]: a divergence between two models over the whole vocabulary. `kind` is a `maths.Kind`."""

    kind: Hashable
    student: str
    teacher: str
    temperature: float = 1.0


@dataclass(frozen=True)
class VocabularyFact:
    """The model's whole vocabulary at any position, chunk by chunk: a model in this process."""

    model: str


@dataclass(frozen=True)
class ColumnFact:
    """Something of the rollouts themselves: "reward", "correct", "group", "mark:NAME", "row:NAME", "memory:NAME"."""

    name: str


@dataclass(frozen=True)
class SpanFact:
    """Of a model that may have a tokenizer of its own: it reads the same text, and spans of it are compared (see `opdkit.align`).

    what: "tokens" [B, T] int, how many of the student's tokens make up the span that ends here, 0 where none ends; "logp" [B, T], the
    model's log-prob of its own tokens of that span, without the one whose distribution is compared; "vocabulary", that distribution,
    chunk by chunk; "single" [B, T] bool, whether it is one token on both sides; "shared" [B, 1] bool, whether the model has the student's
    tokenizer. merge: "bayesian", "observed" or "index". eos: whether the ends of sequence are a span as well.
    """

    model: str
    what: str
    merge: str = ""
    eos: bool = False
    temperature: float = 1.0


Fact = LogpFact | EntropyFact | TopFact | LogpAtFact | GapFact | VocabularyFact | SpanFact | ColumnFact


class MissingFact(LookupError):
    """A formula reads something that was not gathered."""


HOW = {
    "reward": "give the run a reward (reward: math, or file.py:function), or pass reward=[B] to evaluate",
    "correct": "give the run a reward, or pass correct=[B] to evaluate",
    "group": "rollouts of a run carry their prompt as group; pass group=[B] to evaluate",
    "memory": "memory is kept by the method's curriculum; pass it in the batch's memory",
    "row": "the data set has no such column",
}


class Batch:
    """Facts about the rollouts of one step, none with a gradient. Reading an absent one raises `MissingFact`.

    `sources` hold the whole vocabulary of the models in this process (see `head.Source`); all else is a tensor.
    """

    def __init__(
        self,
        tokens: Tensor,  # [B, T] int64
        mask: Tensor,  # [B, T] bool: the trained tokens
        facts: Mapping[Fact, Tensor] | None = None,
        sources: Mapping[str, Any] | None = None,
        keys: Tensor | None = None,  # [B] int64: hash of each rollout's id
        step: int = 0,
        total_steps: int = 1,
        seed: int = 0,
        uniform: Tensor | None = None,  # [B, T]: replaces the keyed draws
        memory: Mapping[str, Any] | None = None,
        rows: Sequence[Row] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.tokens, self.mask = tokens, mask
        self.facts: dict[Fact, Tensor] = dict(facts or {})
        self.sources: dict[str, Any] = dict(sources or {})
        self.keys = torch.arange(len(tokens), device=tokens.device) if keys is None else keys
        self.step, self.total_steps, self.seed = step, total_steps, seed
        self.uniform = uniform
        self.memory = dict(memory or {})
        self.rows = rows
        self.dtype = dtype
        self.signals: dict[Hashable, Tensor] = {}  # values of the step's signals, each computed once

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def shape(self) -> torch.Size:
        return self.tokens.shape

    def read(self, fact: Fact) -> Tensor:
        """The tensor of a fact, detached."""
        if fact not in self.facts:
            raise MissingFact(missing(fact, self))
        return self.facts[fact]

    def __getitem__(self, model: str) -> Scores:
        return Scores(self, model)

    @property
    def reward(self) -> Tensor:
        """[B] float."""
        return self.read(ColumnFact("reward"))

    @property
    def correct(self) -> Tensor:
        """[B] bool."""
        return self.read(ColumnFact("correct"))

    @property
    def group(self) -> Tensor:
        """[B] int64: equal where the prompt is the same."""
        return self.read(ColumnFact("group"))

    def mark(self, name: str) -> Tensor:
        """[B, T] bool: the tokens that carry a mark; none where no rollout of the step has it."""
        return self.facts.get(ColumnFact(f"mark:{name}"), torch.zeros_like(self.mask))

    def column(self, name: str) -> Tensor:
        """[B] numbers from a column of the data rows."""
        return self.read(ColumnFact(f"row:{name}"))

    def source(self, model: str, fact: Fact | None = None) -> Any:
        """The whole vocabulary of a model in this process, read as `fact` (default: over the student's own ids)."""
        if model not in self.sources:
            raise MissingFact(missing(fact or VocabularyFact(model), self))
        return self.sources[model]


@dataclass(frozen=True)
class Scores:
    """What one model (student, sampler, teacher, reference, any other name) says of the step's tokens."""

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

    def top(self, k: int) -> Tensor:
        """[B, T, k] ids of the model's most probable tokens."""
        return self.batch.read(TopFact(self.model, k))

    def at_top(self, owner: str, k: int) -> Tensor:
        """[B, T, k]: this model's log-probs at the top-k ids of `owner`."""
        return self.batch.read(LogpAtFact(self.model, owner, k))


class Live:
    """The student's forward pass at n selected positions: the only thing with a gradient. Exists inside one chunk of the head's pass."""

    def __init__(self, batch: Batch, positions: Tensor, logits: Tensor, parent: tuple[Live, Tensor] | None = None):
        self.batch = batch
        self.positions = positions  # [n] indices into the flattened [B * T]
        self.parent = parent
        self.own: Vocabulary = Vocabulary(logits, None if parent is None else (parent[0].own, parent[1]))
        self.others: dict[str, Vocabulary] = {}

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

    def at(self, ids: Tensor) -> Tensor:
        """[n, k]: log pi_s at token ids [n, k]."""
        return self.own.at(ids)

    def logps(self, temperature: float = 1.0) -> Tensor:
        """[n, V]: log pi_s over the whole vocabulary, logits divided by `temperature`."""
        return self.own.logps(temperature)

    def model_logps(self, model: str, temperature: float = 1.0) -> Tensor:
        """[n, V]: log-probs of another model in this process, no gradient."""
        return self.vocabulary(model).logps(temperature)

    def vocabulary(self, model: str, fact: Fact | None = None) -> Vocabulary:
        """The whole vocabulary of another model in this process, no gradient; shared by all terms of a chunk. `fact`: see `Batch.source`."""
        if model not in self.others:
            if self.parent is None:
                self.others[model] = Vocabulary(self.batch.source(model, fact).logits(self.positions))
            else:
                parent, index = self.parent
                self.others[model] = parent.vocabulary(model, fact).select(index)
        return self.others[model]

    def pick(self, signal: Any) -> Tensor:
        """[n]: a signal of the whole step, at these positions."""
        return signal(self.batch).expand(self.batch.shape).flatten()[self.positions]

    def read(self, fact: Fact) -> Tensor:
        """[n] or [n, k]: a fact [B, T] or [B, T, k] at these positions."""
        return self.batch.read(fact).flatten(0, 1)[self.positions]

    def select(self, index: Tensor) -> Live:
        """The pass at some of these positions."""
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
            raise ValueError("a loss reads positions outside its chunk: it must name them in `joined`")
        return chunk.select(at)


def missing(fact: Fact, batch: Batch) -> str:
    """Why a fact is not there and what to do."""
    if isinstance(fact, ColumnFact):
        kind, _, _ = fact.name.partition(":")
        return f"the objective reads {fact.name!r}, which this batch does not have: {HOW.get(kind, 'supply it')}"
    models = {getattr(fact, name) for name in ("model", "owner", "student", "teacher") if hasattr(fact, name)}
    known = {m for f in batch.facts for m in [getattr(f, "model", None)] if m} | set(batch.sources)
    absent = sorted(models - known)
    if absent:
        return (
            f"the objective reads {fact}, but no scores of {', '.join(absent)} were gathered: "
            f"give the run that model (for example {absent[0]}: MODEL), or pass models={{{absent[0]!r}: logits}} to evaluate"
        )
    return f"the objective reads {fact}, which its model cannot supply: use a model in this process, or another support"


def row_keys(ids: Iterable[str], device: torch.device | str = "cpu") -> Tensor:
    """[B] int64: a hash of each rollout's id, the same on every machine."""
    digests = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64, device=device)
