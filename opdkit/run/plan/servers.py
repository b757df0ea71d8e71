"""Devices beside those that train: vLLM servers that sample, and servers that score."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opdkit.methods.method import Method
from opdkit.models.held import WIDTH, Held
from opdkit.run.plan.devices import GIB, Device
from opdkit.run.plan.machines import Machines
from opdkit.run.plan.memory import PASS, USABLE, Step, pass_bytes, trained
from opdkit.run.plan.models import products_of
from opdkit.run.plan.work import Load, Rates, forward, over, peak, sampling
from opdkit.run.settings import Run

FILES = 2e9  # bytes per second of weights that are written to a folder and read by all servers
STATES = 93e6  # of hidden states from one teacher server, as measured: one core packs them
SHARE = 0.9  # of its device that a server takes


@dataclass(frozen=True)
class Servers:
    """Servers of one model, alike."""

    count: int
    devices: int  # of each of them
    bytes: int  # on each device
    seconds: float  # of a step
    fits: bool


def samplers(
    run: Run,
    student: Held,
    step: Step,
    load: Load,
    device: Device,
    rates: Rates,
    count: int,
    devices: int,
) -> Servers:
    """vLLM servers, each on so many devices, the rollouts of a step divided over them."""
    model, width = student.shaped, 4 if run.dtype == "float32" else 2
    weights = model.parameters * width
    token = 2 * model.layers * model.keys * width
    room = SHARE * device.memory * devices - weights
    fitting = int(max(room, 0) // (token * step.longest))
    prompts = math.ceil(step.prompts / count)
    rollouts = max(1, math.ceil(step.sampled * prompts / step.prompts))
    rows = max(1, min(rollouts, fitting, 256))
    one = Load(prompts, rollouts, rollouts, load.prompt, load.response)
    together = replace(
        device,
        tflops=device.tflops * devices,
        tflops32=device.tflops32 * devices,
        bandwidth=device.bandwidth * devices,
    )
    engine = replace(run, sampler={"kind": "vllm"})
    phase = sampling(engine, student, one, step.response, rows, together, rates)
    size = round(max(SHARE * device.memory, (weights + token * step.longest) / devices))
    return Servers(count, devices, size, phase.seconds, fitting >= 1)


def smallest(run: Run, student: Held, step: Step, machines: Machines) -> int | None:
    """Devices of one machine that a vLLM server needs at least: a power of two; None: it has too
    few.
    """
    model, width = student.shaped, 4 if run.dtype == "float32" else 2
    row = 2 * model.layers * model.keys * width * step.longest
    devices = 1
    while devices <= machines.each:
        if model.parameters * width + row <= SHARE * machines.device.memory * devices:
            return devices
        devices *= 2
    return None


def sent_alone(run: Run) -> int:
    """The rank of the adapters that servers are sent alone; 0: they are sent whole weights."""
    alone = getattr(run.sampler_settings, "enable_lora", False)
    return run.lora.r if run.lora is not None and alone else 0


def pushing(run: Run, student: Held, gathered: float) -> float:
    """Seconds in which servers have the student's new weights, or its adapters alone: put together,
    written, read.
    """
    shape, width = student.shaped, 4 if run.dtype == "float32" else 2
    share = trained(shape, run.lora) / shape.parameters if sent_alone(run) else 1.0
    return share * (gathered + shape.parameters * width / FILES)


def teachers(
    run: Run, method: Method, held: Held, load: Load, device: Device, rates: Rates, count: int
) -> Servers:
    """Teacher servers, each with the whole model on one device. The trainer waits for them: what
    they score before the last rollout has ended is not counted.
    """
    shape = held.shaped
    whole = method.needs.whole(held.kind)
    operations = forward(shape, load.tokens, load.pairs) / count
    operations += 0 if whole else 2 * shape.head * load.responses / count
    products = products_of(run, held)
    seconds = over(operations, peak(device, held.product_width(products)) * rates.score)
    if whole:
        seconds += load.responses * shape.hidden * WIDTH[held.dtype] / STATES / count
    size = GIB + shape.parameters * WIDTH[held.dtype]
    size += PASS * (pass_bytes(held, run) + 2 * shape.hidden * WIDTH[held.dtype])
    return Servers(count, 1, size, seconds, size <= USABLE * device.memory)
