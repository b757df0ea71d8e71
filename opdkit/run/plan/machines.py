"""Several devices that share a run: how many, on how many machines, and how fast numbers travel
between them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from opdkit.base.errors import UserError
from opdkit.run.plan.devices import KNOWN, Device, find_device, quantity

MOST = (1024, 128)  # machines, and devices of each: beyond that it is a slip of the keyboard
REACHED = 0.7  # of a link's peak, by collectives of large tensors


@dataclass(frozen=True)
class Link:
    """Peaks of one GPU in each direction, 10^12 bytes per second."""

    inside: float  # to the others of its machine
    between: float  # its part of the network between machines


# data sheets: NVLink 4 has 900 GB/s both ways together, NVLink 3 600; ConnectX-7 400 Gbit/s and
# ConnectX-6 200 for each GPU of a DGX; without NVLink PCIe 4.0 x16, of whose 32 GB/s 25 are seen
LINKS = {
    "h200": Link(0.45, 0.05),
    "h100": Link(0.45, 0.05),
    "a100": Link(0.3, 0.025),
    "a100-40gb": Link(0.3, 0.025),
}
PLAIN = Link(0.025, 0.003)  # PCIe, and 100 Gbit/s that four GPUs share
MEMORY = Link(0.004, 0.001)  # processes of one CPU: gloo over this machine, and over Ethernet


@dataclass(frozen=True)
class Machines:
    """Devices of one kind, as many in each machine."""

    device: Device
    nodes: int = 1
    each: int = 1  # devices of a machine
    link: Link = PLAIN

    @property
    def size(self) -> int:
        return self.nodes * self.each

    @property
    def words(self) -> str:
        """As `--device` takes it: 2x8xH100."""
        many = [str(n) for n in (self.nodes, self.each) if n > 1 or self.nodes > 1]
        return "x".join([*many, self.device.name])

    @property
    def links(self) -> str:
        """How fast they reach each other, in words."""
        inside, between = self.link.inside * 1e3, self.link.between * 1e3
        network = f", {between:g} between machines for each" if self.nodes > 1 else ""
        return f"peaks of {inside:g} GB/s inside a machine{network}; reached of these {REACHED:.0%}"

    def first(self, count: int) -> Machines:
        """The first so many of them: of one machine, or whole machines."""
        if count <= self.each:
            return replace(self, nodes=1, each=count)
        return replace(self, nodes=-(-count // self.each))

    @property
    def rate(self) -> float:
        """Bytes per second that each device takes in while all exchange: a ring through all of them
        leaves a machine over the network of all its GPUs at once.
        """
        inside, between = self.link.inside, self.link.between * self.each
        return 1e12 * REACHED * (inside if self.nodes == 1 else min(inside, between))

    def gathering(self, size: float) -> float:
        """Seconds in which all have the whole of so many bytes, of which each holds a part; and as
        many for the sum of such a whole, of which each keeps a part.
        """
        return size * (self.size - 1) / self.size / self.rate

    def summing(self, size: float) -> float:
        """Seconds in which all have the sum of so many bytes."""
        return 2 * self.gathering(size)


def find_machines(
    name: str | None,
    nproc: int | None = None,
    *,
    link: str | None = None,
    network: str | None = None,
    setting: str = "auto",
    **given: Any,
) -> Machines:
    """The devices that are meant: `h100`, `8xh100`, `2x8xh100` (machines x devices), `8x80GB`.

    `nproc`: as many of the device in a machine. `link`, `network`: bandwidth of one device to those
    of its machine, and between machines. `given`, `setting`: as `find_device`.
    """
    nodes, each, named = _counted(name)
    if nproc is not None:
        if nproc < 1:
            raise UserError(f"--nproc {nproc}: it is the number of processes, 1 or more")
        if each not in (1, nproc):
            raise UserError(
                f"--device {name} has {each} devices in a machine, and --nproc {nproc} as many "
                "processes: leave one of them out"
            )
        each = nproc
    if named is not None and named.lower() not in (*KNOWN, "cpu") and _amount(named):
        given, named = {"memory": named, **_said(given)}, None
    device = find_device(named, setting=setting, **given)
    if not device.gpu:
        return Machines(_shared(device, each), nodes, each, _linked(MEMORY, link, network))
    words = re.split(r"[\s_]+", device.name.lower())
    known = next((LINKS[w] for w in [device.name.lower(), *words] if w in LINKS), PLAIN)
    return Machines(device, nodes, each, _linked(known, link, network))


def _counted(name: str | None) -> tuple[int, int, str | None]:
    """Machines, devices of each, and the device's own name."""
    found = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?(.+)", name or "", re.IGNORECASE)
    if not found:
        return 1, 1, name or None
    nodes, each = int(found[1] or 1), int(found[2] or 1)
    if not (0 < nodes <= MOST[0] and 0 < each <= MOST[1]):
        raise UserError(
            f"--device {name}: give 1 to {MOST[0]} machines of 1 to {MOST[1]} devices, such as "
            "8xh100, or 2x8xh100"
        )
    return nodes, each, found[3]


def _amount(text: str) -> bool:
    return bool(re.fullmatch(r"\d+(\.\d*)?\s*[GMT]i?B", text, re.IGNORECASE))


def _said(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _linked(link: Link, inside: str | None, between: str | None) -> Link:
    if inside is not None:
        link = replace(link, inside=quantity(inside, 1e9, "--device-link 450GB/s") / 1e12)
    if between is not None:
        link = replace(link, between=quantity(between, 1e9, "--device-network 50GB/s") / 1e12)
    if not link.inside or not link.between:
        raise UserError("--device-link and --device-network must be above 0: nothing could travel")
    return link


def _shared(cpu: Device, count: int) -> Device:
    """A processor's part for one of the processes that share it."""
    if count == 1:
        return cpu
    return replace(
        cpu,
        name=f"{cpu.name} for {count}",
        memory=cpu.memory // count,
        tflops=cpu.tflops / count,
        tflops32=cpu.tflops32 / count,
        bandwidth=cpu.bandwidth / count,
    )
