"""What a teacher may use of a run to open itself, and what has been opened so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from opdkit.base.errors import UserError
from opdkit.curricula import Curriculum
from opdkit.objective.actions import Actions
from opdkit.objective.companion import Companion
from opdkit.objective.needs import Needs


class Reader(Protocol):
    """The method that reads the teacher (see `methods.Method`)."""

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> Needs: ...
    @property
    def curriculum(self) -> Curriculum: ...
    @property
    def teacher_mix(self) -> float: ...
    @property
    def actions(self) -> Actions | None: ...


def no_student() -> Any:
    """The initial weights where there is no student."""
    raise UserError(
        "a teacher of kind self is the student of a run, and here is none: name a model (kind: "
        "local)"
    )


@dataclass(frozen=True)
class TeacherContext:
    """A run as its teacher sees it."""

    method: Reader
    tokenizer: Any  # the student's
    device: str = "cpu"
    dtype: str = "float32"  # of a teacher that does not say its own
    head_dtype: str | None = None  # of the product of its head; null: as its other products
    trust_remote_code: bool = False
    # padded tokens of one forward pass of a model in this process; null: by device
    micro_batch_tokens: int | None = None
    # how the student is asked: `data.Prompts`' template, system, chat and enable_thinking
    questions: Mapping[str, Any] = field(default_factory=lambda: {"chat": False})
    # of models in this process; null: as `models.load.attention_for` says
    attn_implementation: str | None = None
    # ids that the student's head can write; null: all of its tokenizer's
    vocabulary: int | None = None
    # ids that end the student's responses; empty until the student is loaded
    stops: frozenset[int] = frozenset()
    # a loaded model in place of the one that the settings name, or such models by route; None: load
    given: Any = None
    given_tokenizer: Any = None  # of a given model; None: the student's
    # the loaded student, where a caller gave one: a teacher that is the same object is a copy of it
    given_student: Any = None
    role: str = "teacher"  # what the objective calls the model that is opened
    member: str = ""  # which of several that are read as this one: ".NAME"
    student: Any = None  # the model that learns; None until it is loaded
    start: Callable[[], Any] = no_student  # the student's initial weights, as a `LocalModel`
    devices: Any = None  # over which a model in this process is spread; None: it is whole here
    # what stands beside the student for its own teachers
    beside: Mapping[Companion, Any] = field(default_factory=dict)
    # whether token ids must be the student's whatever the method reads: of one in a mixture
    by_ids: bool = False
    # a teacher's model as another process holds it, by the teacher's settings; None, or what it
    # returns is None: it is loaded into this one
    hosts: Callable[[Any, TeacherContext], Any] | None = None
    opened: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` returns; the next time for the same key the same object again."""
        if key not in self.opened:
            self.opened[key] = make()
        return self.opened[key]

    def named(self, model: str) -> TeacherContext:
        """The same for another model of the objective than its teacher: one with the student's
        token ids, by name.
        """
        return replace(self, role=model, given=None, by_ids=True)

    def on_route(self, name: str) -> TeacherContext:
        """The same for the teacher of one route, which alone may have been given as an object."""
        given = self.given.get(name) if isinstance(self.given, Mapping) else self.given
        # of several teachers some may be given, others named
        given = None if isinstance(given, str) else given
        return self._of(name, given) if name != "default" else replace(self, given=given)

    def inside(self, name: str) -> TeacherContext:
        """The same for one of a mixture, whose token ids must be the student's."""
        return replace(self._of(name, None), by_ids=True)

    def _of(self, name: str, given: Any) -> TeacherContext:
        return replace(self, given=given, member=f"{self.member}.{name}")
