"""The kinds of clusters on which a run can be placed, and which one it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from opdkit.base.config import build
from opdkit.base.errors import UserError
from opdkit.base.kinds import known_kind, of_text
from opdkit.base.rules import Rules, at_least, follow

if TYPE_CHECKING:
    from opdkit.run.settings import Run

RAY: Rules = {
    "trainers": at_least(1, "they are the processes that learn, one per GPU"),
    "samplers": at_least(1, "they are the processes that write, one per GPU"),
    "late_samplers": at_least(0, "they are samplers that join once there is room; 0 for none"),
    "teachers": at_least(0, "with 0 the trainers hold the teachers"),
    "parts": at_least(1, "it is into how many a sampler's share of a step is cut"),
    "restarts": at_least(0, "it is how often a run whose trainers died goes on by itself"),
    "patience": at_least(1, "it is the seconds that the run waits for what it needs"),
}


class ClusterSettings(ABC):
    """The settings of one kind of cluster: a file with a frozen dataclass, and its line in
    `KINDS`.
    """

    kind: ClassVar[str]  # as a run names it: kind, kind:..., or {kind: ..., settings}

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """The settings that `kind:text` stands for; none where nothing may follow the colon."""
        return {}

    @abstractmethod
    def train(self, run: Run, *, resume: bool, overwrite: bool, allow_changes: bool) -> Run:
        """Trains a run there, to its end; returns it as it was placed."""


@dataclass(frozen=True)
class RayCluster(ClusterSettings):
    """Ray places the parts of a run, each with a GPU of its own where it uses GPUs, watches them
    and starts again those that die.
    """

    kind = "ray"
    trainers: int = 1  # processes over which the student is spread
    # that write, each with a copy of the student; none are started where the run's sampler is a
    # server, which writes elsewhere already
    samplers: int = 1
    late_samplers: int = 0  # further ones, which join once the cluster has room for them
    # that hold the teachers' models in turn, by what is asked for; 0: the trainers hold them
    teachers: int = 0
    # beside each teacher a process that has imported all and waits, to take over at once
    spare_teachers: bool = True
    # parts, per sampler, into which the prompts of a step are cut; whoever is free takes the next.
    # Of the same prompts in whatever way they are handed out: so rollouts are the same to the bit
    parts: int = 4
    # auto: the cluster of this machine; HOST:PORT; null: the one whose job this is (RAY_ADDRESS, as
    # `ray job submit` sets it), else a new one on this machine
    address: str | None = None
    restarts: int = 3  # of the trainers, from the newest checkpoint
    # seconds to wait for resources to come free, and for a sampler where none is left
    patience: float = 120.0

    def __post_init__(self) -> None:
        follow(RAY, self)

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        return {"address": text}

    def train(self, run: Run, *, resume: bool, overwrite: bool, allow_changes: bool) -> Run:
        from opdkit.run.cluster.driver import drive

        return drive(run, self, resume=resume, overwrite=overwrite, allow_changes=allow_changes)


KINDS: dict[str, type[ClusterSettings]] = {kind.kind: kind for kind in (RayCluster,)}


def cluster_of(value: Any, where: str = "cluster") -> ClusterSettings:
    """A cluster from what a run says: ray, ray:ADDRESS, or a group with `kind`."""
    if isinstance(value, Mapping):
        kind = known_kind(value.get("kind"), KINDS, where, "cluster")
        return build(KINDS[kind], {k: v for k, v in value.items() if k != "kind"}, where + ".")
    if not isinstance(value, str):
        raise UserError(f"{where} must be ray, ray:ADDRESS or a group with `kind`, not {value!r}")
    kind, _, rest = value.partition(":")
    return of_text(KINDS, known_kind(kind, KINDS, where, "cluster"), rest, where, value)
