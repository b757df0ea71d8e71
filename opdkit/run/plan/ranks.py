"""What the processes that train one student tell each other in a step, and the seconds of that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from opdkit.methods.method import Method
from opdkit.models.held import WIDTH, Held
from opdkit.objective.facts import Fact
from opdkit.run.plan.machines import Machines
from opdkit.run.plan.memory import Step, divided, each, scored, trained, trained_width
from opdkit.run.plan.work import Load, Phase
from opdkit.run.settings import Run


@dataclass(frozen=True)
class Exchange:
    """Bytes that are gathered from all processes, or added up over them, in one phase of a step."""

    phase: str
    what: str
    bytes: float  # of the whole
    seconds: float
    behind: bool = False  # travels while the layers before it compute


def exchanges(
    run: Run,
    method: Method,
    models: Sequence[Held],
    step: Step,
    mine: Step,
    load: Load,
    machines: Machines,
) -> list[Exchange]:
    """All of a step. mine, load: one process's part of it."""
    return [
        Exchange(phase, what, size, machines.gathering(size), behind)
        for phase, what, size, behind in _sizes(run, method, models, step, mine, load)
    ]


def _sizes(
    run: Run, method: Method, models: Sequence[Held], step: Step, mine: Step, load: Load
) -> Iterator[tuple[str, str, float, bool]]:
    """Phase, what, bytes of the whole, and whether it travels behind the computing."""
    student, needs = models[0], method.needs
    if divided(student) and step.sampled:
        yield "sample", "the student, whole as it samples, or to be sent", _bytes(student), False
    for held in filter(divided, scored(run, method, models)):
        passes = _passes(held.share * load.tokens, mine)
        yield "score", f"{held.role}'s layers, {passes} passes", passes * _layers(held), True
    if divided(student) and student in scored(run, method, models):
        head = student.shaped.head * WIDTH[student.dtype]
        yield "score", "the student's head", head, False
    # summed, which takes twice the time; those of [B, T, k] stay where they are
    summed = sum(fact.bytes_per_token for fact in needs.facts if not _stays(fact))
    yield "score", "facts of the tokens, summed", 2 * summed * step.positions, False
    updates = run.updates(method) / run.steps
    if divided(student):
        parts = run.optim.minibatches
        often = updates * _passes(load.tokens / parts, mine)
        share = trained(student.shaped, run.lora) / student.shaped.parameters
        gradient = _layers(student) / each(student) * share * trained_width(run)
        both = 2 * _layers(student) + gradient
        what = f"layers there and back and their gradients, {often:.3g} passes"
        yield "learn", what, often * both, True
        head = student.shaped.head * WIDTH[student.dtype]
        learns = 0 if run.lora else student.shaped.head * trained_width(run)
        yield "learn", "the head and its gradient", updates * (head + learns), False
    else:
        gradients = trained(student.shaped, run.lora) * trained_width(run)
        yield "learn", "gradients, summed", 2 * updates * gradients, False


def exchanged(phase: Phase, all_: Sequence[Exchange]) -> Phase:
    """A phase with what is exchanged in it: what travels behind the computing takes longer only
    where it takes longer than that.
    """
    mine = [one for one in all_ if one.phase == phase.name]
    behind = sum(one.seconds for one in mine if one.behind)
    beside = sum(one.seconds for one in mine if not one.behind)
    if not behind + beside:
        return phase
    said = f"{phase.says}; exchange {behind + beside:.2g} s"
    said += f", {behind:.2g} of them behind it" if behind else ""
    return replace(phase, seconds=max(phase.seconds, behind) + beside, says=said)


def _bytes(held: Held) -> float:
    return held.shaped.parameters * each(held)


def _layers(held: Held) -> float:
    """Bytes of what a pass gathers: all but a head of its own, and of a frozen model the head."""
    shape = held.shaped
    apart = held.role != "student" or not shape.tied
    return (shape.parameters - shape.head * apart) * each(held)


def _passes(tokens: float, mine: Step) -> int:
    """Forward passes over so many tokens."""
    return max(1, math.ceil(tokens / mine.micro))


def _stays(fact: Fact) -> bool:
    return bool(fact.shape)
