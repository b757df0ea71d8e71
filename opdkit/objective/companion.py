"""State beside the student: critics, copies of the student, controllers, running statistics.

A `Companion` is a frozen dataclass that says what there is, and its own key: what reads it asks for
it by that value. Its state is built once, changes after each optimiser step, and is saved with the
student. No other file asks which companions there are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opdkit.base.errors import UserError
from opdkit.types import Rollout, row_keys


@dataclass(frozen=True)
class Around:
    """What there is when a companion is built."""

    # width H of a model's hidden states by name, "student" or another in this process
    width: Callable[[str], int]
    device: torch.device
    dtype: torch.dtype  # of the numbers that losses and signals compute in
    seed: int = 0
    model: Any = None  # the student; None where a formula runs on plain logits
    # a model of the student's kind as one that scores rollouts, as the run would score with it
    scorer: Callable[[Any], Any] | None = None
    layers: Sequence[nn.Module] = ()  # of the student, in their order; none on plain logits
    # a copy of the student as the run holds it: spread over the processes, where there are several
    placed: Callable[[Any], Any] = lambda model: model


@dataclass(frozen=True)
class Stepped:
    """An optimiser step that was taken."""

    batch: Any  # objective.batch.Batch: the facts of the step's rollouts
    mask: Tensor  # [B, T] bool: the tokens that this optimiser step trained
    rollouts: Sequence[Rollout] = ()  # B
    updates: int = 1  # optimiser steps of the run, this one included
    model: Any = None  # the student after it; None where a formula runs on plain logits


# is told of whom the rows of the student's next pass are
Hear = Callable[[Sequence[Rollout]], object]


class CompanionState(ABC):
    """What a companion is in a run. An `nn.Module` may be one: `class Mine(nn.Module,
    CompanionState)`.

    With a method `source(layout, positions)` it is a model that scores rollouts (see
    `teachers.base`), under its companion's name.
    """

    @contextmanager
    def disturbed(self, updates: int) -> Iterator[Hear]:
        """Of a companion that `disturbs`: while it is open the student's passes are those that it
        learns in, in the optimiser step number `updates` (from 0), not those in which it writes or
        is scored.

        What is called with the rollouts of a pass before each says whose rows these are.
        """
        yield lambda rollouts: None

    def parameters(self) -> Iterable[Tensor]:
        """Those that a loss computes with and that learn, of any shape [...].

        Their gradients are added up over the micro-batches of an optimiser step, as the student's
        are, and cleared behind it.
        """
        return ()

    def after_step(self, stepped: Stepped) -> None:
        """Called once after each optimiser step of the student."""
        return

    def metrics(self) -> dict[str, float]:
        """Where it stands, by name: for the run's curves."""
        return {}

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """All that changes in a run: tensors, numbers, texts, and lists and dicts of these."""

    @abstractmethod
    def load_state_dict(self, state: Any) -> Any:
        """Continue from what `state_dict` returned."""


class Companion(ABC):
    """Says what stands beside the student. Subclasses are frozen dataclasses; a loss may be one for
    itself.
    """

    # The name under which a formula reads it, where it is a model: LogRatio("ema", "student").
    model = ""
    # Whether the student learns in other passes than those in which it writes and is scored: see
    # `CompanionState.disturbed`.
    disturbs: ClassVar[bool] = False

    @property
    def copies(self) -> int:
        """How many copies of the weights that learn it holds, for estimates of memory; a model is
        taken to hold one.
        """
        return int(bool(self.model))

    @abstractmethod
    def build(self, around: Around) -> CompanionState:
        """Its state at the start of a run. Random numbers are keyed: it starts the same always."""


class Trained(CompanionState):
    """A module with an AdamW of its own, which steps when the student's has; call it as the module.

    It computes in its own dtype, whatever the student's products are in. A gradient whose norm is
    above `max_norm` is cut to it.
    """

    def __init__(
        self, module: nn.Module, learning_rate: float, max_norm: float = math.inf, **optim: Any
    ):
        self.module, self.max_norm = module, max_norm
        self.optimiser = torch.optim.AdamW(
            module.parameters(), lr=learning_rate, **{"weight_decay": 0.0, **optim}
        )

    def __call__(self, *inputs: Tensor) -> Tensor:
        """[...]: what the module makes of inputs [...]."""
        with torch.autocast(inputs[0].device.type, enabled=False):
            return self.module(*inputs)

    def parameters(self) -> Iterable[Tensor]:
        """Of the module, of any shape [...]."""
        return self.module.parameters()

    def after_step(self, stepped: Stepped) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), self.max_norm)
        self.optimiser.step()

    def state_dict(self) -> Mapping[str, Any]:
        return {"module": self.module.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])


class Companions(Mapping[Companion, CompanionState]):
    """The companions of a run, each with its state."""

    def __init__(self, built: Mapping[Companion, CompanionState] | None = None):
        self.built = dict(built or {})

    @staticmethod
    def build(companions: Iterable[Companion], around: Around) -> Companions:
        """Builds each once; the random state is left as it was."""
        asked = sorted(set(companions), key=repr)
        if twice := {a for a, b in pairwise(asked) if repr(a) == repr(b)}:
            raise UserError(
                f"two companions are both written {twice.pop()!r}, so their saved states could not "
                "be told apart: give one of the classes another name"
            )
        made: dict[Companion, CompanionState] = {}
        devices = [around.device] if around.device.type == "cuda" else []
        for companion in asked:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(int(row_keys([f"companion {around.seed} {companion!r}"])))
                made[companion] = companion.build(around)
        built = Companions(made)
        built.state_dict()  # what could not be saved is an error now
        return built

    def __getitem__(self, companion: Companion) -> CompanionState:
        return self.built[companion]

    def __iter__(self) -> Iterator[Companion]:
        return iter(self.built)

    def __len__(self) -> int:
        return len(self.built)

    @property
    def parameters(self) -> list[Tensor]:
        """All that learn with the losses, of any shape [...]."""
        return [p for state in self.values() for p in state.parameters() if p.requires_grad]

    @property
    def tensors(self) -> list[Tensor]:
        """All [...] that their states hold, and that may move from one optimiser step to the
        next.
        """
        return _tensors([state.state_dict() for state in self.values()])

    @property
    def scorers(self) -> dict[str, Any]:
        """Those that are models, by name."""
        found = {spec.model: (spec, state) for spec, state in self.items() if spec.model}
        for name, (spec, state) in found.items():
            if not hasattr(state, "source"):
                raise UserError(
                    f"{spec} calls itself the model {name!r}, but what it builds "
                    f"({type(state).__name__}) has no `source(layout, positions)` to be read "
                    "through: around.scorer(model).source is one"
                )
        return {name: state for name, (_, state) in found.items()}

    @property
    def disturb(self) -> bool:
        """Whether the student learns in other passes than those in which it is scored."""
        return any(spec.disturbs for spec in self)

    @contextmanager
    def disturbed(self, updates: int) -> Iterator[Hear]:
        """The student's passes as those that it learns in: see `CompanionState.disturbed`."""
        with ExitStack() as stack:
            every = [
                stack.enter_context(state.disturbed(updates))
                for spec, state in self.items()
                if spec.disturbs
            ]
            yield lambda rollouts: [hear(rollouts) for hear in every]

    def refuse_broken(self) -> None:
        """The error where a gradient is not finite, before anything is moved."""
        for companion, state in self.items():
            slopes = [p.grad for p in state.parameters() if p.grad is not None]
            if slopes and not bool(torch.stack([g.isfinite().all() for g in slopes]).all()):
                raise UserError(
                    f"the gradient of {companion} is not finite though the loss is: nothing was "
                    "moved. Lower its learning rate, or bound what its loss aims at"
                )

    def after_step(self, stepped: Stepped) -> None:
        """Tells all of an optimiser step, and clears their gradients."""
        for state in self.values():
            state.after_step(stepped)
        for parameter in self.parameters:
            parameter.grad = None

    def metrics(self) -> dict[str, float]:
        """Where they stand, by name; of two that use one name, the last's."""
        return {name: value for state in self.values() for name, value in state.metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        """Of each, by how it is written."""
        states = {repr(companion): state.state_dict() for companion, state in self.items()}
        for name, state in states.items():
            _refuse_strange(name, state)
        return states

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; refused where those are others."""
        mine = {repr(companion): state for companion, state in self.items()}
        if set(mine) != set(saved):
            raise UserError(
                f"it holds the state of {_listed(saved)}, and this run has {_listed(mine)} beside "
                "its student"
            )
        for name, state in mine.items():
            try:
                state.load_state_dict(saved[name])
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise UserError(
                    f"its state of {name} is not one that it can continue from ({error})"
                ) from error


def _refuse_strange(companion: str, value: Any) -> None:
    """What a checkpoint does not hold: it is read again without running any code."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for part in value:
            _refuse_strange(companion, part)
    elif not isinstance(value, (Tensor, bool, int, float, str, NoneType)):
        raise UserError(
            f"the state of {companion} holds a {type(value).__name__}, which checkpoints do not: "
            "state_dict() is made of tensors, numbers, texts, and lists and dicts of these"
        )


def _tensors(value: Any) -> list[Tensor]:
    """Those [...] in a nested state."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value
    nested = isinstance(value, (Mapping, list, tuple))
    return [tensor for part in parts for tensor in _tensors(part)] if nested else []


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
