"""Facts: what a formula can read of a step's rollouts, each a value that says of which model and
how much.

Everything that differs from one kind of fact to another is a member of `Fact`; no other file asks
of which class a fact is. A kind of one's own is a subclass in any file.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from opdkit.objective.companion import Companion
from opdkit.objective.kernels import Vocabulary, divergence
from opdkit.types import Watch

ReadFrom = Literal["rollouts", "chunk", "step", "loss"]


class Chunk(Protocol):
    """n positions of a step at which vocabularies can be read; `batch.Live` is one."""

    @property
    def tokens(self) -> Tensor:
        """[n] int64: the sampled tokens."""

    def vocabulary(self, model: str) -> Vocabulary:
        """A model's logits [n, V] and what is computed of them, no gradient."""

    def hidden_of(self, model: str) -> Tensor:
        """[n, H]: a model's last hidden states, no gradient."""

    def companion(self, companion: Companion) -> Any:
        """The state of a companion, as it is before the step."""


@dataclass(frozen=True)
class Noted:
    """What was noted of a model's softmax at each token while it wrote or scored it.

    Tensors or arrays of the same leading shape. What teachers' records hold (`logp`, `top_ids`,
    `top_logp`) is read alike.
    """

    logp: Any  # [...]: of the tokens themselves
    top_ids: Any = None  # [..., k] most probable first
    top_logp: Any = None  # [..., k]
    entropy: Any = None  # [...] nats


@dataclass(frozen=True)
class Fact:
    """A number per token, or several: a tensor [B, T] or [B, T, k] that a formula asks for with
    `batch.read(fact)`.

    A kind of fact is a frozen dataclass (a fact is a key: equal facts are read once). It says in
    `words` what it is and in `read` how it is read off a vocabulary. All other members have an
    answer that is right for a fact of one model which takes that model's whole vocabulary. For
    example the log-prob of the second most probable token:

        @dataclass(frozen=True)
        class SecondFact(Fact):
            model: str

            def words(self):
                return f"{self.model} log-prob of its second most probable token"

            def read(self, here, first):
                vocabulary = here.vocabulary(self.model)
                return vocabulary.at(vocabulary.logits.topk(2).indices)[:, 1]

    A signal reads `batch.read(SecondFact("teacher"))`; that is found by running the formula, and
    gathered.
    """

    # Whether it takes the whole vocabulary of its models: they run in this process, or send their
    # hidden states.
    whole_vocabulary: ClassVar[bool] = True
    # Whether its model may have a tokenizer of its own; else it is about the student's token ids.
    own_tokenizer: ClassVar[bool] = False
    # Whether it can be read of the live student too, as it moves from update to update.
    of_live: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float32  # int64: token ids
    # what its numbers are, by which one from elsewhere is checked: "logp", "entropy", "ids", ""
    number: ClassVar[str] = ""

    # ---------------------------------------------------------------------------------- what it is

    @property
    def models(self) -> tuple[str, ...]:
        """The models it speaks of; the first is the one that is asked for it."""
        return (self.model,)  # type: ignore[attr-defined]

    def words(self) -> str:
        """What it is, in messages and lists."""
        return str(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """What follows [B, T] in its tensor: () or (k,)."""
        return ()

    @property
    def numbers(self) -> int:
        """Numbers per token."""
        return math.prod(self.shape)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of its tensor per token, floats counted as float32; 0 where none is kept."""
        kept = self.read_from in ("chunk", "step")
        return self.numbers * self.dtype.itemsize if kept else 0

    # ------------------------------------------------------------------------------- how it is read

    @property
    def read_from(self) -> ReadFrom:
        """What it is read from.

        rollouts: they carry it, no model is asked. chunk: `read` takes it off the vocabularies at
        some positions. step: the model's source answers `read(fact, mask)` for all positions at
        once. loss: it has no tensor; the loss itself takes the model's source, chunk by chunk.
        """
        return "chunk"

    @property
    def whole_step(self) -> bool:
        """Whether its model's hidden states are needed at all positions of the step at once."""
        return self.read_from in ("step", "loss")

    @property
    def needs_first(self) -> tuple[TopFact, ...]:
        """The token ids at which it is read: they have to be there before."""
        return ()

    @property
    def others_first(self) -> tuple[TopFact, ...]:
        """Those of `needs_first` that another model than the one asked has to name."""
        return tuple(ids for ids in self.needs_first if ids.model != self.models[0])

    @property
    def companions(self) -> tuple[Companion, ...]:
        """The companions that `read` asks for: each field that is one."""
        return tuple(value for value in vars(self).values() if isinstance(value, Companion))

    def read(self, here: Chunk, first: Mapping[TopFact, Tensor]) -> Tensor:
        """[n] or [n, k] at the n positions of `here`; `first` has what `needs_first` names,
        [n, k] each.
        """
        raise TypeError(f"{self} is not read off a vocabulary")

    def made_up(self, rows: int, length: int, vocabulary: int) -> Tensor:
        """[rows, length] or [rows, length, k]: values that it could have, for running a formula
        only to see what it reads. k is at most `vocabulary`.
        """
        return torch.full((rows, length, *(min(k, vocabulary) for k in self.shape)), -1.0)

    # --------------------------------------------------------------- where else it can come from

    def watch(self, model: str) -> Watch | None:
        """What has to be noted of one of its models at each token, besides the token's own
        log-prob, for that model's share in this fact; None: notes do not suffice.
        """
        return None

    def of_notes(self, noted: Any) -> Any:
        """[...] or [..., k] from notes (`Noted`, or like it) that hold what `watch` names."""
        raise TypeError(f"{self} is not read off notes")

    def depth(self, model: str) -> int:
        """How many of a model's most probable tokens it takes from notes; 0: none."""
        noted = self.watch(model)
        return 0 if noted is None else noted.top

    def in_scores(self, model: str) -> bool:
        """Whether a model's share is in what servers and caches hold of it: log-probs of the
        tokens and of its most probable ones.
        """
        noted = self.watch(model)
        return noted is not None and not noted.entropy

    def as_student(self) -> Fact | None:
        """A fact of the live student as one of the student before the step; None: it cannot be
        read of the live student.
        """
        return replace(self, model="student") if self.of_live else None  # type: ignore[call-arg]

    # -------------------------------------------------------------------------- what is said of it

    def metrics(self, facts: Mapping[Fact, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Means over the tokens of `mask` [B, T] that are worth a curve, [] each, by name; `facts`
        are all of the step, [B, T] or [B, T, k].
        """
        return {}

    def missing(self, known: set[str]) -> str:
        """Why it is not there and what to do, where something is known of the models `known`."""
        if absent := sorted(set(self.models) - known):
            setting = absent[0] if absent[0] in ("teacher", "reference") else f"models.{absent[0]}"
            return (
                f"the objective reads {self.words()}, but no scores of {', '.join(absent)} were "
                f"gathered: give the run that model (for example {setting}: MODEL), or pass "
                f"models={{{absent[0]!r}: logits}} to evaluate"
            )
        return (
            f"the objective reads {self.words()}, which its model cannot supply: use a model in "
            "this process, or another support"
        )


# -------------------------------------------------------------------------------------- one number


@dataclass(frozen=True)
class LogpFact(Fact):
    """[B, T]: log pi_model(y_t)."""

    model: str
    whole_vocabulary: ClassVar[bool] = False
    of_live: ClassVar[bool] = True
    number: ClassVar[str] = "logp"

    def words(self) -> str:
        return f"{self.model} log-prob of the sampled token"

    def read(self, here: Chunk, first: Mapping[TopFact, Tensor]) -> Tensor:  # [n]
        return here.vocabulary(self.model).at(here.tokens[:, None])[:, 0]

    def watch(self, model: str) -> Watch | None:
        return Watch()

    def of_notes(self, noted: Any) -> Any:
        return noted.logp


@dataclass(frozen=True)
class EntropyFact(Fact):
    """[B, T]: entropy of pi_model over the whole vocabulary."""

    model: str
    # a number that a server can compute
    whole_vocabulary: ClassVar[bool] = False
    of_live: ClassVar[bool] = True
    number: ClassVar[str] = "entropy"

    def words(self) -> str:
        return f"{self.model} entropy"

    def read(self, here: Chunk, first: Mapping[TopFact, Tensor]) -> Tensor:  # [n]
        return here.vocabulary(self.model).statistics()[1]

    def made_up(self, rows: int, length: int, vocabulary: int) -> Tensor:  # [B, T]
        return torch.ones(rows, length)

    def watch(self, model: str) -> Watch | None:
        return Watch(entropy=True)

    def of_notes(self, noted: Any) -> Any:
        return noted.entropy


@dataclass(frozen=True)
class GapFact(Fact):
    """[B, T]: a divergence, a `Kind`, between two models over the whole vocabulary."""

    kind: Hashable
    student: str
    teacher: str
    temperature: float = 1.0

    @property
    def models(self) -> tuple[str, ...]:
        return (self.student, self.teacher)

    def words(self) -> str:
        return f"{self.kind} of {self.student} and {self.teacher} over the whole vocabulary"

    def read(self, here: Chunk, first: Mapping[TopFact, Tensor]) -> Tensor:  # [n]
        student, teacher = here.vocabulary(self.student), here.vocabulary(self.teacher)
        return divergence(self.kind, student, teacher, self.temperature)  # type: ignore[arg-type]

    def made_up(self, rows: int, length: int, vocabulary: int) -> Tensor:  # [B, T]
        return torch.ones(rows, length)


# ----------------------------------------------------------------------------- most probable tokens


@dataclass(frozen=True)
class TopFact(Fact):
    """[B, T, k] int: ids of the k most probable tokens of a model, most probable first."""

    model: str
    k: int
    whole_vocabulary: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.int64
    number: ClassVar[str] = "ids"

    def words(self) -> str:
        return f"{self.model} top-{self.k} ids"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.k,)

    def read(self, here: Chunk, first: Mapping[TopFact, Tensor]) -> Tensor:  # [n, k]
        logits = here.vocabulary(self.model).logits
        return logits.topk(min(self.k, logits.shape[-1]), -1).indices

    def made_up(self, rows: int, length: int, vocabulary: int) -> Tensor:  # [B, T, k]
        return torch.arange(min(self.k, vocabulary)).expand(rows, length, -1)

    def watch(self, model: str) -> Watch | None:
        return Watch(top=self.k)

    def of_notes(self, noted: Any) -> Any:
        return noted.top_ids[..., : self.k]

    def metrics(self, facts: Mapping[Fact, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """The share of the student's and the teacher's top k that is the same, [], over `mask`
        [B, T].
        """
        other = TopFact("teacher", self.k)
        if self.model != "student" or other not in facts:
            return {}
        values = facts[self][mask]
        both = torch.cat([values, facts[other][mask]], -1).sort(-1).values
        same = (both[:, 1:] == both[:, :-1]).double().sum(-1)
        return {f"overlap/top_{self.k}": same.mean() / values.shape[-1]}


@dataclass(frozen=True)
class LogpAtFact(Fact):
    """[B, T, k]: log pi_model at the top-k ids of `owner`; normalised over the whole vocabulary."""

    model: str
    owner: str
    k: int
    whole_vocabulary: ClassVar[bool] = False
    number: ClassVar[str] = "logp"

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model, self.owner)

    def words(self) -> str:
        return f"{self.model} log-probs at the {self.owner}'s top {self.k}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.k,)

    @property
    def needs_first(self) -> tuple[TopFact, ...]:
        return (TopFact(self.owner, self.k),)

    def read(self, here: Chunk, first: Mapping[TopFact, Tensor]) -> Tensor:  # [n, k]
        return here.vocabulary(self.model).at(first[TopFact(self.owner, self.k)])

    def made_up(self, rows: int, length: int, vocabulary: int) -> Tensor:  # [B, T, k]
        return torch.full((rows, length, min(self.k, vocabulary)), -3.0)

    def watch(self, model: str) -> Watch | None:
        """The owner names its ids, and its log-probs with them; another model has to be asked."""
        return Watch(top=self.k) if model == self.owner else None

    def of_notes(self, noted: Any) -> Any:
        assert self.owner == self.model, self
        return noted.top_logp[..., : self.k]

    def metrics(self, facts: Mapping[Fact, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """The mass of a model on the top k, of student and teacher, [], over `mask` [B, T]."""
        if not {self.model, self.owner} <= {"student", "teacher"}:
            return {}
        mass = facts[self][mask].exp().sum(-1).clamp_max(1.0).mean()
        return {f"mass/{self.model}_on_{self.owner}_top_{self.k}": mass}


# ---------------------------------------------------------------------- what is no number per token


@dataclass(frozen=True)
class VocabularyFact(Fact):
    """The model's whole vocabulary at any position, chunk by chunk: a model in this process."""

    model: str
    of_live: ClassVar[bool] = True

    def words(self) -> str:
        return f"{self.model} over the whole vocabulary"

    @property
    def read_from(self) -> ReadFrom:
        return "loss"


HOW_TO_SUPPLY = {
    "reward:": "name it in the run, reward: {NAME: math}, or pass rewards={NAME: [B]} to evaluate",
    "reward": "give the run a reward (math, or file.py:function), or pass reward=[B] to evaluate",
    "correct": "give the run a reward, or pass correct=[B] to evaluate",
    "group": "rollouts of a run carry their prompt as group; pass group=[B] to evaluate",
    "memory": "memory is kept by the method's curriculum; pass it in the batch's memory",
    "row": "the data set has no such column; pass rows={column: [B]} to evaluate",
}


@dataclass(frozen=True)
class ColumnFact(Fact):
    """[B] (a mark: [B, T]): something of the rollouts themselves: "reward", "reward:NAME",
    "correct", "group", "question", "mark:NAME", "row:NAME", "memory:NAME".
    """

    name: str
    whole_vocabulary: ClassVar[bool] = False

    @property
    def models(self) -> tuple[str, ...]:
        return ()

    def words(self) -> str:
        return self.name

    @property
    def read_from(self) -> ReadFrom:
        return "rollouts"

    def made_up(self, rows: int, length: int, vocabulary: int) -> Tensor:
        """[rows], all of one group; [rows, length] where no token has the mark."""
        if self.name.startswith("mark:"):
            return torch.zeros(rows, length, dtype=torch.bool)
        if self.name == "group":
            return torch.zeros(rows, dtype=torch.int64)
        values = torch.arange(rows, dtype=torch.float32)
        return values > 0 if self.name == "correct" else values

    def missing(self, known: set[str]) -> str:
        how = next((h for k, h in HOW_TO_SUPPLY.items() if self.name.startswith(k)), "supply it")
        return f"the objective reads {self.name!r}, which this batch does not have: {how}"


class MissingFact(LookupError):
    """A formula reads something that was not gathered."""
