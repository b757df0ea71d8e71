"""Operations of a step, and the seconds they take at stated rates.

A matrix of n entries takes 2 n operations per token forwards, and 4 n backwards where it learns (2
n below adapters). Decoding one token reads every weight and the cached tokens once, so it is bound
by bandwidth until many rollouts are decoded at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opdkit.base.errors import UserError
from opdkit.methods.method import Method
from opdkit.models.held import ENGINE, Held
from opdkit.models.shapes import Shape
from opdkit.objective.facts import VocabularyFact
from opdkit.objective.needs import Needs
from opdkit.run.plan.devices import Device
from opdkit.run.plan.memory import Step, scored, trained, trained_width
from opdkit.run.plan.models import products_of
from opdkit.run.settings import Run

OPTIMISER = 10  # numbers read and written per parameter: gradient norm and clipping 3, AdamW 7
MEAN_PROMPT = 200  # tokens of a prompt: a word problem in a chat template


@dataclass(frozen=True)
class Rates:
    """What of a device's peaks a phase reaches, and what else time depends on: assumptions."""

    learn: float = 0.4  # of the peak of matrix products
    score: float = 0.5  # also of prompts, and of decoding
    wide: float = 0.7  # of the float32 peak, in the head's gradient
    read: float = 0.6  # of the bandwidth
    # seconds per layer and decoding step in transformers, which starts every kernel from Python
    launch: float = 8e-4
    graph: float = 2e-5  # in vLLM, which replays them
    response: float = 0.5  # mean length of responses, of the longest allowed

    def __post_init__(self) -> None:
        for name in ("learn", "score", "wide", "read", "response"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(
                    f"the share {name}={getattr(self, name):g} must be above 0 and at most 1"
                )


USUAL = Rates()


@dataclass(frozen=True)
class Phase:
    """One phase of a step."""

    name: str
    seconds: float  # infinite where the device's rates are not known
    operations: float
    says: str  # what it was reckoned from


@dataclass(frozen=True)
class Load:
    """Rollouts at their mean length."""

    prompts: int
    rollouts: int
    sampled: float  # of these, and of others that it only compares them with, are written in it
    prompt: float
    response: float

    @property
    def tokens(self) -> float:
        """Of all forward passes over whole rollouts."""
        return self.rollouts * (self.prompt + self.response)

    @property
    def responses(self) -> float:
        """Tokens of all responses."""
        return self.rollouts * self.response

    @property
    def written(self) -> float:
        """Tokens that are sampled."""
        return self.sampled * self.response

    @property
    def pairs(self) -> float:
        """Pairs of tokens of which one attends to the other."""
        return self.rollouts * (self.prompt + self.response) ** 2 / 2


def load_of(step: Step, rates: Rates, response: float | None = None) -> Load:
    mean = response if response is not None else rates.response * step.response
    return Load(
        step.prompts,
        step.rollouts,
        step.sampled,
        min(MEAN_PROMPT, step.prompt),
        min(mean, step.response),
    )


# --------------------------------------------------------------------------------------- operations


def forward(shape: Shape, tokens: float, pairs: float) -> float:
    """Of the body: its matrices, and the two products of attention at each pair of tokens."""
    return 2 * shape.active * tokens + 4 * shape.layers * shape.queries * pairs


def body(run: Run, shape: Shape, tokens: float, pairs: float) -> float:
    """Of the student's body, forwards and backwards, and once more forwards with checkpointing."""
    once, matrices = forward(shape, tokens, pairs), 2 * shape.active * tokens
    attention = once - matrices
    if run.lora is None:  # a layer's last matrix is not computed again: nothing behind it is needed
        again = once - 2 * shape.layers * shape.intermediate * shape.hidden * tokens
        return 3 * once + (again if run.gradient_checkpointing else 0)
    # frozen matrices take no gradient of their own
    adapters = 2 * shape.adapters(run.lora) * tokens
    return (
        2 * matrices
        + 3 * attention
        + 3 * adapters
        + (once + adapters if run.gradient_checkpointing else 0)
    )


def head(run: Run, shape: Shape, positions: float) -> tuple[float, float]:
    """Of the student's head at so many positions: in the type of the other products, and in float32
    (all of them with `head_dtype`; else in float32 runs the head's own gradient).
    """
    once, own = 2 * shape.head * positions, 0 if run.lora else 1
    if run.dtype != "bfloat16":
        return 2 * once, once * own
    if run.head_dtype == "float32":
        return 0, once * (2 + own)
    return once * (1 + 2 * (1 + own)), 0  # a slope is multiplied as two 16-bit numbers


# ------------------------------------------------------------------------------------------- phases


def peak(device: Device, width: int) -> float:
    """Operations per second of products whose inputs have so many bytes."""
    return {2: device.tflops, 4: device.tflops32, 8: device.tflops32 / 2}[width] * 1e12


def over(work: float, rate: float) -> float:
    """Seconds; infinite where the rate is not known."""
    return work / rate if rate else math.inf


def phases(
    run: Run,
    method: Method,
    models: Sequence[Held],
    load: Load,
    longest: int,
    rows: int,
    device: Device,
    rates: Rates,
    ranks: int = 1,
) -> list[Phase]:
    """The phases of one step; of several processes the load is that of one."""
    out = [sampling(run, models[0], load, longest, rows, device, rates)] if load.sampled else []
    out.append(scoring(run, method, models, load, device, rates))
    return [*out, learning(run, method, models, load, device, rates, ranks)]


def sampling(
    run: Run, student: Held, load: Load, longest: int, rows: int, device: Device, rates: Rates
) -> Phase:
    """Prompts once per group, then one token of every open rollout at a time; some rollout runs to
    the limit.
    """
    shape = student.shaped
    prompts = forward(shape, load.prompts * load.prompt, load.prompts * load.prompt**2 / 2)
    # tokens attended to, in all
    context = load.sampled * (load.prompt * load.response + load.response**2 / 2)
    decoding = forward(shape, load.written, context) + 2 * shape.head * load.written
    pace = run.sampler_settings.pace(student, run.dtype, rates.launch, rates.graph)
    if pace is None:
        return Phase("sample", 0.0, prompts + decoding, "by servers, whose time is not counted")
    steps = max(longest, load.written / rows)
    read = steps * pace.width * (shape.active + shape.head) + context * pace.cached
    speed = peak(device, pace.width)
    bounds = {
        "starting kernels": steps * shape.layers * pace.launch,
        "bandwidth": over(read, 1e12 * device.bandwidth * rates.read),
        "arithmetic": over(decoding, speed * rates.score),
    }
    slowest = max(bounds, key=lambda name: bounds[name])
    seconds = over(prompts, speed * rates.score) + bounds[slowest]
    return Phase(
        "sample",
        seconds,
        prompts + decoding,
        f"{steps:,.0f} decoding steps of {rows} rollouts, bound by {slowest}",
    )


def scoring(
    run: Run, method: Method, models: Sequence[Held], load: Load, device: Device, rates: Rates
) -> Phase:
    """A forward pass of each model that is read; what a server takes for its own is not
    known here.
    """
    needs, seconds, operations = method.needs, 0.0, 0.0
    here = [*scored(run, method, models), *(held for held in models if held.where == ENGINE)]
    for held in here:
        reads_numbers = any(fact.read_from != "loss" for fact in needs.of(held.kind))
        work = (
            forward(held.shaped, load.tokens, load.pairs)
            + 2 * held.shaped.head * load.responses * reads_numbers
        )
        operations += held.share * work
        seconds += over(
            held.share * work,
            peak(device, held.product_width(products_of(run, held))) * rates.score,
        )
    names = ", ".join(held.role for held in here)
    return Phase(
        "score", seconds, operations, f"one pass of {names}" if names else "nothing in this process"
    )


def learning(
    run: Run,
    method: Method,
    models: Sequence[Held],
    load: Load,
    device: Device,
    rates: Rates,
    ranks: int = 1,
) -> Phase:
    """The student's passes with gradient, and the optimiser."""
    student = models[0]
    shape = student.shaped
    products, own = head(run, shape, load.responses)
    whole = sum(
        held.share * 2 * held.shaped.head * load.responses
        for held in models[1:]
        if _whole(method.needs, held)
    )
    updates = run.updates(method) / run.steps  # of a step on average, where they differ
    passes = updates / run.optim.minibatches
    fast = passes * (body(run, shape, load.tokens, load.pairs) + products + whole)
    slow = passes * own
    moved = updates * OPTIMISER * trained(shape, run.lora) * trained_width(run) / ranks
    seconds = over(fast, peak(device, student.product_width(run.dtype)) * rates.learn)
    seconds += over(slow, peak(device, 4) * rates.wide) + over(
        moved, 1e12 * device.bandwidth * rates.read
    )
    layers = "layers computed twice" if run.gradient_checkpointing else "no checkpointing"
    many = f"{updates:.3g} update{'s' if updates > 1 else ''}" + " on average" * (updates % 1 > 0)
    says = f"forwards and backwards, {layers}, {many}"
    return Phase("learn", seconds, fast + slow, says)


def _whole(needs: Needs, held: Held) -> bool:
    return held.shape is not None and VocabularyFact(held.kind) in needs.facts
