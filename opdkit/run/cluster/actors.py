"""The one file that knows Ray: it is started or joined, room is reserved in it, and objects are
made that live in processes of their own (actors).
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from opdkit.base.errors import UserError
from opdkit.teachers.pool import Gone

EVERY = 0.2  # seconds between two looks at what is awaited
Bundle = Mapping[str, float]  # what one part of a run takes: {"CPU": 1, "GPU": 1}


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(
            "cluster=ray places the run with Ray, which is not installed: pip install "
            "'opdkit[ray]', on every machine of the cluster. Without it: opdkit train --nproc N on "
            "one machine, torchrun on several"
        ) from error
    return ray


class Lost(Gone):
    """An actor that is no more, and is not started again."""


def got(reference: Any, timeout: float | None = None) -> Any:
    """What an actor's method returned; its error as it was raised there, `Gone` where the actor is
    not there, TimeoutError where it is not done by then.
    """
    ray, told = _ray(), _ray().exceptions
    try:
        return ray.get(reference, timeout=timeout)
    except told.RayTaskError as error:
        if isinstance(error.cause, told.RayError):  # the task lost what it was given
            raise Gone(_short(error.cause)) from error
        raise error.cause from error
    except told.ActorDiedError as error:
        raise Lost(_short(error)) from error
    except told.GetTimeoutError as error:
        raise TimeoutError from error
    except told.RayError as error:
        raise Gone(_short(error)) from error


def _short(error: BaseException) -> str:
    """The first line of a message of Ray's, which goes on for many."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


@dataclass(frozen=True)
class Actor:
    """An object in a process of its own; can be handed to others."""

    name: str
    handle: Any

    def ask(self, method: str, *arguments: Any) -> Any:
        """A call under way, for `got`."""
        return getattr(self.handle, method).remote(*arguments)

    def __call__(self, method: str, *arguments: Any) -> Any:
        """What a method returns, waited for."""
        return got(self.ask(method, *arguments))

    def end(self) -> None:
        """Ends its process at once, for good."""
        with suppress(Exception):
            _ray().kill(self.handle)


def stored(thing: Any) -> Any:
    """A thing in the object store: handed to many actors, it is sent once to each machine."""
    return _ray().put(thing)


def named(prefix: str) -> dict[str, Actor]:
    """The actors of this run by their names, those that begin with `prefix`."""
    ray, found = _ray(), {}
    for name in ray.util.list_named_actors():
        if name.startswith(prefix):
            with suppress(ValueError):  # it has ended meanwhile
                found[name] = Actor(name, ray.get_actor(name))
    return found


def here() -> tuple[str, str]:
    """The machine of this process: its id, and its address in the network."""
    ray = _ray()
    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Behind it SIGTERM is handled as before: Ray decides on it as it begins."""
    mine = threading.current_thread() is threading.main_thread()
    usual = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, usual)


class Cluster:
    """Ray, started for this run or joined."""

    def __init__(self, address: str | None, namespace: str, cpus: float):
        """cpus: that the run takes, as Ray counts them: a Ray that is started here for this run
        alone counts as many, whatever the machine has.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        ray = _ray()
        if ray.is_initialized():
            raise UserError(
                "this process is connected to Ray already, and a run opens it for itself: end that "
                "first (ray.shutdown()), or start the run as `opdkit train`"
            )
        address = address or os.environ.get("RAY_ADDRESS") or None
        self.alone = address is None
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            count = max(os.cpu_count() or 1, math.ceil(cpus))
            settings |= {"address": "local", "num_cpus": count, "include_dashboard": False}
        else:
            settings["address"] = address
        try:
            with _own_signals():
                ray.init(namespace=namespace, **settings)
        except Exception as error:
            raise UserError(
                f"Ray could not be {'started here' if address is None else f'joined at {address}'} "
                f"({_short(error)}). Start it with `ray start --head` and on other machines `ray "
                "start --address=HOST:6379`, with one RAY_AUTH_TOKEN everywhere, then give "
                "cluster.address=auto there, or leave address out to use this machine alone"
            ) from error
        self.here = here()[0]
        self.group: Any = None

    @property
    def gpus(self) -> float:
        return float(sum(node["Resources"].get("GPU", 0.0) for node in self._nodes()))

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in _ray().nodes() if node["Alive"]]

    def reserve(self, parts: Mapping[str, Bundle], patience: float) -> None:
        """Room for all parts of a run at once; an error that says what is missing, once machines
        that might join have been waited for.
        """
        ray = _ray()
        end = time.monotonic() + patience
        while missing := unplaced(parts, [node["Resources"] for node in self._nodes()]):
            if self.alone or time.monotonic() > end:
                raise UserError(self._too_small(parts, missing))
            time.sleep(EVERY)
        self.names = list(parts)
        self.group = ray.util.placement_group([dict(b) for b in parts.values()], strategy="PACK")
        if not self.group.wait(max(1.0, end - time.monotonic())):
            raise UserError(
                f"the run's {len(parts)} parts ({_sum(parts.values())}) did not find room within "
                f"{patience:g} s: the cluster has {_sum(n['Resources'] for n in self._nodes())}, "
                f"of which {_sum([ray.available_resources()])} is free. Others use the rest: end "
                "them, ask for less (cluster.samplers, cluster.teachers), or raise cluster.patience"
            )

    def _too_small(self, parts: Mapping[str, Bundle], missing: Sequence[str]) -> str:
        nodes = [node["Resources"] for node in self._nodes()]
        return (
            f"the cluster is too small for this run: it needs {_sum(parts.values())} for "
            f"{', '.join(parts)}, and has {_sum(nodes)} on {len(nodes)} machine(s). No room is "
            f"left for {', '.join(missing)}. Add machines (`ray start --address=HOST:6379`), or "
            "ask for less: cluster.trainers, cluster.samplers, cluster.teachers"
        )

    def start(
        self,
        kind: type,
        arguments: Sequence[Any],
        name: str,
        *,
        place: str | None = None,
        take: Bundle | None = None,
        again: bool = False,
    ) -> Actor:
        """An object of a class in a process of its own.

        Arguments:
            place: the part of the run whose room it takes, all or what `take` says; None: it takes
                `take` wherever there is room, or nothing, on this machine.
            again: whether it is started again when its process ends.
        """
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        options: dict[str, Any] = {"name": name, "max_restarts": -1 if again else 0}
        if place is not None:
            at = self.names.index(place)
            take = self.group.bundle_specs[at] if take is None else take
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self.group, at)
        elif take is None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.here, soft=False)
        take = take or {}
        options |= {"num_cpus": take.get("CPU", 0), "num_gpus": take.get("GPU", 0)}
        try:
            return Actor(name, _ray().remote(kind).options(**options).remote(*arguments))
        except ValueError as error:
            raise UserError(
                f"the cluster has a {name} of this run already: another program does the run in "
                "this folder. Wait for its end, or choose another output=DIR"
            ) from error

    def close(self) -> None:
        """Ends all that was started in it, and leaves it."""
        ray = _ray()
        if self.group is not None:
            with suppress(Exception):
                ray.util.remove_placement_group(self.group)
        ray.shutdown()


def unplaced(parts: Mapping[str, Bundle], nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """The parts for which no room is left once those before them are placed, the largest first:
    each whole on one machine.
    """
    free = [dict(node) for node in nodes]
    left = []
    for name in sorted(parts, key=lambda n: (-parts[n].get("GPU", 0), -parts[n].get("CPU", 0))):
        need = parts[name]
        fitting = [f for f in free if all(f.get(k, 0.0) >= v - 1e-9 for k, v in need.items())]
        if not fitting:
            left.append(name)
            continue
        for kind, amount in need.items():
            fitting[0][kind] -= amount
    return left


def _sum(bundles: Any) -> str:
    """Resources added up, in words."""
    bundles = list(bundles)
    found = {kind: sum(b.get(kind, 0.0) for b in bundles) for kind in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {kind}" for kind, amount in found.items())
