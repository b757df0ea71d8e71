"""A critic: what is still to come, told from the student's hidden state before each token.

head = ValueHead()
PolicyGradient(Reward() - Value(head)) + 0.5 * ValueLoss(Reward(), head)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from opdkit.objective.batch import Batch, Live
from opdkit.objective.companion import Around, Companion, Trained
from opdkit.objective.facts import Chunk, Fact, TopFact
from opdkit.objective.grammar import Signal, TokenLoss


@dataclass(frozen=True)
class ValueHead(Companion):
    """One linear number of a hidden state, with an AdamW of its own; equal ones are one head."""

    learning_rate: float = 1e-3

    def build(self, around: Around) -> Trained:
        linear = nn.Linear(around.width("student"), 1, device=around.device, dtype=around.dtype)
        return Trained(linear, self.learning_rate)


@dataclass(frozen=True)
class ValueFact(Fact):
    """[B, T]: a head's value before each token, from the student before the step.

    The head is any companion that makes one number [n, 1] of hidden states [n, H].
    """

    head: Companion

    @property
    def models(self) -> tuple[str, ...]:
        return ("student",)

    def words(self) -> str:
        return f"the value that {self.head} gives"

    def read(self, here: Chunk, first: Mapping[TopFact, Tensor]) -> Tensor:  # [n]
        return here.companion(self.head)(here.hidden_of("student"))[:, 0]


@dataclass(frozen=True)
class Value(Signal):
    """[B, T]: the head's value before each token, before the step: a baseline, as it does not
    depend on the token.
    """

    head: Companion = ValueHead()

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        return batch.read(ValueFact(self.head))


@dataclass(frozen=True)
class ValueLoss(TokenLoss):
    """(value - target)^2 / 2, backpropagated into the head, and with `into_student` through the
    hidden state into the student.
    """

    target: Signal
    head: Companion = ValueHead()
    into_student: bool = True
    name: ClassVar[str] = "value"

    def value(self, live: Live) -> Tensor:  # [n]
        hidden = live.hidden if self.into_student else live.hidden.detach()
        value = live.companion(self.head)(hidden)[:, 0]
        return (value - live.pick(self.target)).square() / 2


@dataclass(frozen=True)
class LastToken(Signal):
    """[B, T] bool: the last token of each rollout that the student drew and learns from.

    RowMean(Value(head), among=LastToken()) is a value of the whole rollout.
    """

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        counted = batch.mask.cumsum(1)
        return batch.mask & (counted == counted[:, -1:])
