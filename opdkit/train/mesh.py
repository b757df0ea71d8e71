"""Several processes that train one student: who works on what, and how what each found becomes the
whole. Other files of the loop ask a `Mesh`, whether there is one process or several.

Every process holds all rollouts of a step. It scores and learns its own part of their tokens; facts
[B, T] are then summed over the processes, after which signals, counts, means, quantiles and group
statistics are computed from whole tensors and are the same everywhere.
"""

from __future__ import annotations

import atexit
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import copy
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, TypeVar

import torch
from torch import Tensor

from opdkit.base.interrupt import EndedElsewhere, status
from opdkit.base.launched import CLAIM, GRACE, processes, tell
from opdkit.train.ending import Watch, end_within, lost
from opdkit.types import Rollout

Thing = TypeVar("Thing")
Made = TypeVar("Made")

PATIENCE = 60  # minutes that a process waits for the others, which may be sampling


class Mesh(ABC):
    """What the loop asks of the processes that share a run."""

    rank: int  # of this one, from 0
    size: int  # how many there are
    devices: Any = None  # over which models may be spread: a DeviceMesh, one device per process
    small: Any = None  # the group of torch.distributed that small objects go through

    @abstractmethod
    def total(self, values: Tensor) -> Tensor:
        """[...]: the sum over all processes, of values [...] of one shape everywhere."""

    @abstractmethod
    def every(self, thing: Thing) -> list[Thing]:
        """What each process has, in the order of their ranks: a small object."""

    def mine(self, rollouts: Sequence[Rollout], width: int) -> Tensor:
        """[B, width] bool: the tokens that this process scores and learns; of every token that is
        one process.
        """
        owner = torch.tensor(self.owners(rollouts), dtype=torch.int64)
        return (owner == self.rank)[:, None].expand(-1, width)

    def owners(self, rollouts: Sequence[Rollout]) -> list[int]:
        """The rank that scores and learns each rollout."""
        return by_length(rollouts, self.size)

    def most(self, number: int) -> int:
        """The largest of what the processes have."""
        return max(self.every(number))

    def level(self, parts: Sequence[Thing], idle: Thing) -> list[Thing]:
        """Parts of work, as many everywhere as the most that one has; those added are `idle`."""
        return [*parts, *[idle] * (self.most(len(parts)) - len(parts))]

    @abstractmethod
    def handed(self, parts: Sequence[Thing]) -> list[Thing]:
        """What each process has for this one, in the order of their ranks; `parts`: what this one
        has for each. Of any size, with tensors of the CPU.
        """

    def first(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, for all."""
        made: Any = self.same(make() if self.rank == 0 else None)
        return made

    def same(self, thing: Thing) -> Thing:
        """What the first process has, where what each has might differ."""
        return self.every(thing)[0]

    def aside(self) -> Mesh:
        """The same processes by a channel of its own: for a thread that works beside the loop, and
        exchanges small objects only. It is asked for on all at once.
        """
        return self

    def folder(self, first: Path) -> Path:
        """Where this process writes: the run's folder, of which the first is the only writer, or
        one of its own that nobody reads.
        """
        if self.rank == 0:
            return first
        claim = os.environ.get(CLAIM)  # beside it, what the launcher clears away if this is killed
        there = Path(claim).parent if claim else None
        made = Path(mkdtemp(prefix=f"opdkit-rank{self.rank}-", dir=there))
        atexit.register(rmtree, made, ignore_errors=True)
        return made

    def divided(
        self, things: Sequence[Thing], work: Callable[[Sequence[Thing]], Sequence[Made]]
    ) -> list[Made]:
        """What `work` makes of each thing, for all: each process works on every `size`-th."""
        if self.size == 1:
            return list(work(things))
        mine = list(things[self.rank :: self.size])
        parts = self.every(list(work(mine)) if mine else [])
        return [parts[i % self.size][i // self.size] for i in range(len(things))]


class Alone(Mesh):
    """One process: all is its own, and what it has is the whole."""

    rank, size = 0, 1

    def total(self, values: Tensor) -> Tensor:  # as `values`
        return values

    def every(self, thing: Any) -> list[Any]:
        return [thing]

    def handed(self, parts: Sequence[Thing]) -> list[Thing]:
        return list(parts)


ALONE = Alone()


class Ranks(Mesh):
    """The processes of one run, one per device, as torchrun or `opdkit train --nproc` starts them:
    a group of torch.distributed.
    """

    def __init__(self, device: str):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.rendezvous import rendezvous

        kind, patience = torch.device(device).type, timedelta(minutes=PATIENCE)
        # numbers of a GPU by NCCL, small objects by gloo
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        self.store, self.rank, self.size = next(rendezvous("env://", timeout=patience))
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.size, timeout=patience
        )
        self.devices = init_device_mesh(kind, (self.size,))
        self.small = dist.new_group(backend="gloo") if kind == "cuda" else None

    def total(self, values: Tensor) -> Tensor:  # as `values`
        import torch.distributed as dist

        summed = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    def every(self, thing: Any) -> list[Any]:
        import torch.distributed as dist

        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.small)
        return things

    def handed(self, parts: Sequence[Thing]) -> list[Thing]:
        import torch.distributed as dist

        got: list[Any] = []
        for source in range(self.size):
            mine, theirs = list(parts) if source == self.rank else None, [None]
            dist.scatter_object_list(theirs, mine, src=source, group=self.small)
            got += theirs
        return got

    def aside(self) -> Mesh:
        import torch.distributed as dist

        other = copy(self)
        other.small = dist.new_group(backend="gloo")
        return other


@contextmanager
def joined(device: str) -> Iterator[Mesh]:
    """The mesh of this process, and at its end its leave-taking.

    Of several processes only the first speaks; of an error the one that met it first, and the
    others end in silence.
    """
    if processes() == 1:
        yield ALONE
        return
    mesh = Ranks(device)
    watch = Watch(mesh.store)
    watch.start()
    with ExitStack() as stack:
        if mesh.rank:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        try:
            yield mesh
            watch.stop()
            mesh.every(None)  # none leaves before all have done what they had to
        except KeyboardInterrupt as stop:
            watch.stop()
            if mesh.rank:
                raise EndedElsewhere(status(stop)) from stop
            raise
        except BaseException as error:
            end_within(2 * GRACE)  # it may have to say why
            watch.stop()
            atexit.register(_leave)  # once it is said why
            if lost(error) or not watch.fail():
                raise EndedElsewhere(1) from error
            tell()
            raise
    _leave()


def _leave() -> None:
    import torch.distributed as dist

    with suppress(Exception):  # where others are gone, there is nobody to take leave of
        dist.destroy_process_group()


def by_length(rollouts: Sequence[Rollout], size: int) -> list[int]:
    """The rank that works on each rollout: the longest first, each to who has the fewest tokens so
    far; the same on every process.
    """
    loads, owner = [0] * size, [0] * len(rollouts)
    length = [len(r.prompt) + len(r.tokens) for r in rollouts]
    for b in sorted(range(len(rollouts)), key=lambda b: (-length[b], b)):
        owner[b] = loads.index(min(loads))
        loads[owner[b]] += length[b]
    return owner
