"""What every kind of sampler says of itself: its settings, as a run names them, and all that
depends on the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from opdkit.models.held import Held
from opdkit.objective.head import Head
from opdkit.types import Sampler, Watch

if TYPE_CHECKING:
    from opdkit.sampling.hf import Guide


@dataclass(frozen=True)
class SamplerContext:
    """A run as its sampler sees it."""

    model: Any  # the student: a Hugging Face model that trains in this process
    tokenizer: Any
    # the student's, cut to the vocabulary that all models of the run share, as it is now
    head_now: Callable[[], Head]
    products: str = "float32"  # the dtype of the student's matrix products, whatever its weights'
    longest: int = 0  # tokens of the longest rollout there can be, prompt and response
    guide: Guide | None = None  # takes part in decoding, where the kind is `on_student`
    watch: Watch = Watch()  # what is to be noted at each token, where the kind is `on_student`
    trust_remote_code: bool = False
    # where `model` is a copy of the student: the student's log-probs [N] of the probe
    known: Callable[[], Tensor | None] = lambda: None

    @property
    def head(self) -> Head:
        return self.head_now()


@dataclass(frozen=True)
class Sizes:
    """A step as a plan shows it to a sampler: at the longest prompts and responses."""

    student: Held
    guide: Held | None  # the model that takes part in decoding
    products: str  # dtype of matrix products
    rollouts: int
    longest: int  # tokens of one, prompt and response
    memory: int  # bytes of the device
    free: int  # bytes of it that nothing else holds while the sampler works
    gpu: bool


@dataclass(frozen=True)
class Room:
    """What a sampler takes of the device."""

    name: str  # in the table of memory
    bytes: float
    rows: int  # rollouts that it samples at once
    always: bool = False  # also while the trainer scores and learns


@dataclass(frozen=True)
class Pace:
    """What the time of decoding depends on."""

    width: int  # bytes of a number in the weights that are read, and in matrix products
    cached: int  # bytes of one cached token
    launch: float  # seconds per layer and decoding step to start its kernels


class SamplerSettings(ABC):
    """The settings of one kind of sampler.

    A new kind is one file with a frozen dataclass, and its line in `sampling.kinds.KINDS`. Here one
    that writes with the student itself and says what it is asked:

        @dataclass(frozen=True)
        class LoudSettings(SamplerSettings):
            kind = "loud"
            on_student = True

            def open(self, context: SamplerContext) -> Sampler:
                return LoudSampler(HFSampler(context.model, context.tokenizer,
                head=context.head_now))

            def room(self, sizes: Sizes) -> Room:
                return HfSettings().room(sizes)

            def pace(self, student, products, launch, graph) -> Pace:
                return HfSettings().pace(student, products, launch, graph)

        class LoudSampler:  # a `types.Sampler`
            def __init__(self, inner: HFSampler):
                self.inner, self.sync = inner, inner.sync

            def sample(self, prompts, sampling, **settings) -> list[Rollout]:
                print(f"{len(prompts)} prompts")
                return self.inner.sample(prompts, sampling, **settings)
    """

    kind: ClassVar[str]  # as a run names it: kind, kind:..., or {kind: ..., settings}
    # whether the very model that trains writes: its log-probs are the trainer's own arithmetic, its
    # weights need not be sent, and another model can take part in decoding
    on_student: ClassVar[bool] = False
    # whether it can write while the student learns: its sampler has `staged`, the first half of
    # `sync` (see `types.Elsewhere`), and of several processes the first alone asks it
    elsewhere: ClassVar[bool] = False

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """The settings that `kind:text` stands for; none where nothing may follow the colon."""
        return {}

    @abstractmethod
    def open(self, context: SamplerContext) -> Sampler:
        """What lets the student write its responses; engines are imported and started now."""

    @abstractmethod
    def room(self, sizes: Sizes) -> Room | None:
        """What it takes of the device, for a plan; None: nothing, as it is elsewhere."""

    @abstractmethod
    def pace(self, student: Held, products: str, launch: float, graph: float) -> Pace | None:
        """What the time of decoding depends on, for a plan; None: it is elsewhere, and its time is
        not counted.

        Arguments:
            student: the model whose weights it has.
            products: dtype of the trainer's matrix products.
            launch: seconds to start the kernels of a layer from Python.
            graph: seconds to start them where they are recorded and replayed.
        """

    def lighter(self) -> Iterable[tuple[str, SamplerSettings]]:
        """Settings, each alone, with which it would take less of the device, and what they are
        called.
        """
        return ()
