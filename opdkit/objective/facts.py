"""Facts: what a formula can read of a step's rollouts, each a value that says of which model and
how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable


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
    """[B, T]: a divergence between two models over the whole vocabulary.

    `kind` is a `maths.Kind`.
    """

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
    """Something of the rollouts themselves: "reward", "correct", "group", "mark:NAME", "row:NAME",
    "memory:NAME".
    """

    name: str


@dataclass(frozen=True)
class SpanFact:
    """Of a model that may have a tokenizer of its own: it reads the same text, and spans of it are
    compared (see `opdkit.objective.alignment`).

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


Fact = (
    LogpFact | EntropyFact | TopFact | LogpAtFact | GapFact | VocabularyFact | SpanFact | ColumnFact
)


class MissingFact(LookupError):
    """A formula reads something that was not gathered."""


HOW = {
    "reward": "give the run a reward (reward: math, or file.py:function), or pass reward=[B] to "
    "evaluate",
    "correct": "give the run a reward, or pass correct=[B] to evaluate",
    "group": "rollouts of a run carry their prompt as group; pass group=[B] to evaluate",
    "memory": "memory is kept by the method's curriculum; pass it in the batch's memory",
    "row": "the data set has no such column",
}
