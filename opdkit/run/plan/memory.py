"""Bytes on the device by part and phase, as the engines allocate them: weights, optimiser,
activations, caches, hidden states.

Weights, gradients, optimiser and held tensors follow from the shapes. Activations are what autograd
keeps of transformers' Qwen3 layers (norms in float32, fused attention that keeps no scores); other
gated decoders keep about as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from opdkit.curricula import Curriculum, reads_cache, writer_of
from opdkit.methods.explain import scored_before
from opdkit.methods.method import Method
from opdkit.models.held import HERE, WIDTH, Held, stored
from opdkit.models.layout import HELD
from opdkit.models.shapes import Shape
from opdkit.objective.head import CHUNK_BYTES, CHUNK_ENTRIES, CHUNK_MOST, CHUNK_PART
from opdkit.objective.needs import Needs
from opdkit.run.plan.devices import GIB, Device
from opdkit.run.plan.models import products_of
from opdkit.run.settings import Run
from opdkit.sampling.settings import Sizes
from opdkit.train.settings import Lora

PHASES = ("sample", "score", "learn")
PASS = 16384  # padded tokens of a GPU's forward pass, where nobody says
LONGEST_PROMPT = 1024  # tokens, where data.max_prompt_length does not say
CONTEXT = GIB  # of a GPU: its context, kernels, and what the allocator cannot use
USABLE = 0.95  # of a device
AT_ONCE = 2  # layers of a model that is spread: one computes, the next is on its way


@dataclass(frozen=True)
class Step:
    """Sizes of one step at the longest prompts and responses that the run allows."""

    prompts: int
    rollouts: int
    prompt: int  # tokens
    response: int
    micro: int  # padded tokens of the largest forward pass
    sampled: float  # responses that are written in it, on average

    @property
    def longest(self) -> int:
        return self.prompt + self.response

    @property
    def positions(self) -> int:
        return self.rollouts * self.response


def step_of(run: Run, curriculum: Curriculum, device: Device) -> Step:
    prompt = run.prompts.max_prompt_length or LONGEST_PROMPT
    response = run.sampling.max_completion_length
    writer, prompts = writer_of(curriculum), run.prompts_per_step
    rollouts = prompts * writer.rollouts(run.sampling) + curriculum.beside(prompts)
    budget = run.micro_batch_tokens or (PASS if device.gpu else 1024)
    micro = min(max(budget, prompt + response), rollouts * (prompt + response))
    sampled = prompts * writer.sampled(run.sampling)
    return Step(prompts, rollouts, prompt, response, micro, sampled)


def part_of(step: Step, ranks: int) -> Step:
    """What one of several processes has of a step: whole prompts are sampled, rollouts are scored
    and learnt.
    """
    if ranks == 1:
        return step
    prompts, rollouts = math.ceil(step.prompts / ranks), math.ceil(step.rollouts / ranks)
    micro = min(step.micro, rollouts * step.longest)
    sampled = step.sampled * prompts / step.prompts
    return replace(step, prompts=prompts, rollouts=rollouts, micro=micro, sampled=sampled)


@dataclass(frozen=True)
class MemoryPart:
    """Bytes in the phases in which they are held."""

    name: str
    bytes: dict[str, int]


@dataclass
class Memory:
    """What a step holds."""

    device: Device
    parts: list[MemoryPart] = field(default_factory=list)
    rows: int = 0  # rollouts that are sampled at once

    def add(self, name: str, size: float, phases: Iterable[str] = PHASES) -> None:
        self.part(name, dict.fromkeys(phases, size))

    def part(self, name: str, sizes: Mapping[str, float]) -> None:
        if any(sizes.values()):
            whole = {phase: round(size) for phase, size in sizes.items()}
            self.parts.append(MemoryPart(name, whole))

    def total(self, phase: str) -> int:
        return sum(part.bytes.get(phase, 0) for part in self.parts)

    def free(self, phase: str) -> int:
        return max(0, self.device.memory - self.total(phase))

    @property
    def peak(self) -> tuple[int, str]:
        """Bytes of the phase that takes most, and its name."""
        return max((self.total(phase), phase) for phase in PHASES)

    @property
    def fits(self) -> bool:
        return self.peak[0] <= USABLE * self.device.memory


def memory_of(
    run: Run, method: Method, models: Sequence[Held], step: Step, device: Device, ranks: int = 1
) -> Memory:
    """All parts of a step's memory, in each of so many processes with a device of their own."""
    needs, shape, out = method.needs, models[0].shaped, Memory(device)
    mine = part_of(step, ranks)
    if device.gpu:
        out.add("GPU context", CONTEXT)
    for held in models:
        waits = (
            held.weights - held.shaped.head * WIDTH[held.dtype]
            if held.offload and held.weights and device.gpu
            else 0
        )
        spread = ranks if divided(held) else 1
        # the head of a frozen model stays whole
        whole = held.shaped.head * WIDTH[held.dtype] if spread > 1 and _frozen(held) else 0
        part = f", 1/{spread} of them" if spread > 1 else ""
        out.part(
            f"{held.role} weights, {held.numbers}{part}",
            {
                p: (held.weights - whole - (waits if p != "score" else 0)) / spread + whole
                for p in PHASES
            },
        )
        out.add(f"{held.role}'s vLLM engine", held.engine * device.memory)
    read = scored(run, method, models)
    _student(out, run, shape, models[0] in read, ranks)
    beside = {*method.companions, *run.copies_for(method)}
    held_beside = sum(companion.copies for companion in beside)
    learns = trained(shape, run.lora) * trained_width(run)
    out.add("copies of the student beside it", held_beside * learns / ranks)
    out.add(
        "facts of the tokens",
        sum(fact.bytes_per_token for fact in needs.facts) * step.positions,
        ("score", "learn"),
    )
    _scoring(out, needs, read, run, mine)
    _learning(out, run, shape, mine)
    guide = next(held for held in models if held.role == "teacher") if method.teacher_mix else None
    if ranks > 1:
        _wholes(out, run, models[0], read, guide)
    if step.sampled:
        _sampling(out, run, models[0], guide, mine)
    sampled = out.rows if run.sampler_settings.on_student else 0
    # positions that are projected, at most
    rows = {"sample": sampled, "score": mine.positions, "learn": mine.micro}
    out.part(
        "one chunk of the vocabulary",
        {p: _chunk(out.free(p), n * shape.vocab, device) for p, n in rows.items() if n},
    )
    return out


# ------------------------------------------------------------------------------------------ student


def trained(shape: Shape, lora: Lora | None) -> int:
    """Parameters that learn."""
    return shape.parameters if lora is None else shape.adapters(lora)


def trained_width(run: Run) -> int:
    """Bytes of one parameter that learns: adapters of 16-bit weights are float32."""
    return 8 if run.dtype == "float64" else 4


def _student(out: Memory, run: Run, shape: Shape, scores: bool, ranks: int) -> None:
    size = trained(shape, run.lora) * trained_width(run) / ranks
    if run.lora is not None:
        out.add("adapters", size)
    out.add("two moments of AdamW", 2 * size)
    out.add("gradients", size, ("learn",))
    phases = ("sample", "score", "learn") if scores else ("sample", "learn")
    kept: tuple[str, ...] = phases  # by autocast; of a model that is spread by autograd alone
    if ranks > 1:
        kept = ("sample",) if run.gradient_checkpointing else ("sample", "learn")
    out.add(
        "bfloat16 copies of what learns",
        copies(run, shape),
        kept if run.sampler_settings.on_student else kept[1:],
    )
    if out.device.gpu and run.lora is None and run.dtype == "bfloat16" and run.head_dtype is None:
        out.add("bfloat16 copy of the student's head", 2 * shape.head, phases)


def copies(run: Run, shape: Shape) -> int:
    """Bytes of the copies that autocast keeps of weights that learn until a pass is over, the
    head's apart.
    """
    if run.dtype != "bfloat16":
        return 0
    return 2 * (shape.active if run.lora is None else shape.adapters(run.lora))


def activations(run: Run, shape: Shape, tokens: int) -> int:
    """Bytes that autograd keeps for one forward pass of the student, the head apart."""
    layer, between = tokens * layer_bytes(run, shape), tokens * shape.hidden * hidden_width(run)
    layers = layer * shape.layers
    # the inputs of all layers, and one layer at a time computed again
    if run.gradient_checkpointing:
        layers = between * shape.layers + layer
    # the last norm, and its result; frozen layers keep less of it
    return layers + (3 if run.lora is None else 2) * between


def hidden_width(run: Run) -> int:
    """Bytes of a number between the student's layers: those are added up in float32 at least."""
    return max(WIDTH["float32"], WIDTH[run.dtype])


def layer_bytes(run: Run, shape: Shape) -> int:
    """Bytes per token that one layer keeps. q, k, i: widths of queries, of keys, of the
    feed-forward layer.
    """
    h, q, k, i = shape.hidden, shape.queries, shape.keys, shape.intermediate
    norm = int(shape.qk_norm)
    statistics = 4 * (2 + shape.heads + norm * (shape.heads + shape.kv_heads))
    wide = WIDTH[run.dtype]  # where nothing is cast
    if run.lora is None:
        if run.dtype == "bfloat16":  # each product keeps a bfloat16 copy of its input
            return 26 * h + (4 + 6 * norm) * q + (4 + 6 * norm) * k + 8 * i + statistics
        return wide * (6 * h + (2 + 2 * norm) * q + (2 + 2 * norm) * k + 4 * i) + statistics
    r, adapted = run.lora.r, shape.adapted(run.lora)
    each = len(adapted) / shape.layers
    inputs = sum(x.inputs for x in adapted) / shape.layers
    if run.dtype == "bfloat16":  # frozen weights keep no input, adapters a bfloat16 copy each
        return (
            round(8 * h + (4 + 4 * norm) * q + (4 + 4 * norm) * k + 6 * i + 2 * (inputs + r * each))
            + statistics
        )
    names = {x.name.rpartition(".")[2] for x in adapted}
    shared = (
        h * bool(names & {"q_proj", "k_proj", "v_proj"})
        + h * bool(names & {"gate_proj", "up_proj"})
        + i * ("down_proj" in names)
    )
    return (
        round(wide * (2 * h + (2 + norm) * q + (2 + norm) * k + 3 * i + shared + r * each))
        + statistics
    )


def _learning(out: Memory, run: Run, shape: Shape, step: Step) -> None:
    how = "recomputed layer by layer" if run.gradient_checkpointing else "no checkpointing"
    out.add(
        f"activations of {step.micro:,} tokens, {how}",
        activations(run, shape, step.micro),
        ("learn",),
    )
    # at the positions, their gradient, and that of all tokens
    states = 3 * step.micro * shape.hidden * hidden_width(run)
    # its gradient, and the embedding's, before they are added up
    head = 0 if run.lora else 2 * shape.head * trained_width(run)
    out.add("hidden states and head of a micro-batch", states + head, ("learn",))


# ---------------------------------------------------------------------------- in several processes


def divided(held: Held) -> bool:
    """Whether processes hold a part each of a model: not of one in few bits, nor of one that waits
    on the CPU.
    """
    return held.where == HERE and held.quantize is None and not held.offload


def each(held: Held) -> float:
    """Bytes of a weight, on average."""
    return stored(held.shaped, held.dtype, held.quantize) / held.shaped.parameters


def _frozen(held: Held) -> bool:
    """Whether it is a model of its own that does not learn."""
    return held.role != "student" and held.weights > 0


def _wholes(out: Memory, run: Run, student: Held, read: Sequence[Held], guide: Held | None) -> None:
    """What a process has whole of models that are spread: layers as they compute, the embedding
    from a pass's beginning to its end, the head for a step, all of what samples in it.
    """
    wide, shape = WIDTH[student.dtype], student.shaped
    if run.sampler_settings.on_student:
        for held in filter(None, (student, guide)):
            if divided(held):
                size = held.shaped.parameters * each(held)
                out.add(f"{held.role} whole, as it samples", size, ("sample",))
    spread = [held for held in read if divided(held)]
    if divided(student):
        out.add("student's head whole", shape.head * wide)
        share = trained(shape, run.lora) / shape.parameters
        gradient = shape.layer * share * trained_width(run)
        layers = {"learn": AT_ONCE * (_layer(student, run) + gradient)}
    else:
        layers = {"learn": 0.0}
    layers["score"] = AT_ONCE * max((_layer(held, run) for held in spread), default=0)
    out.part("layers whole, as they compute", layers)
    ends = {"learn": shape.head * wide * divided(student)}
    ends["score"] = max((_embedding(held) for held in spread), default=0)
    out.part("embedding whole, during a pass", ends)


def _embedding(held: Held) -> int:
    """Bytes of one that is gathered for a pass: not of one that is a head which is whole anyway."""
    there = _frozen(held) and held.shaped.tied
    return 0 if there else held.shaped.head * WIDTH[held.dtype]


def _layer(held: Held, run: Run) -> float:
    """Bytes of a model's largest layer, and of its rounded copy where it learns in 16 bits."""
    rounded = 2 if held.role == "student" and run.dtype == "bfloat16" and run.lora is None else 0
    return held.shaped.layer * (each(held) + rounded)


# ------------------------------------------------------------------------------------------ scoring


def scored(run: Run, method: Method, models: Sequence[Held]) -> list[Held]:
    """The models in this process that make a forward pass over all rollouts before the step."""
    needs = method.needs
    # nothing noted can be used
    again = run.recomputes_student or run.correct_sampling or reads_cache(method.curriculum)
    student = models[:1] if scored_before(method) or (again and needs.of("student")) else []
    return [
        *student,
        *(held for held in models[1:] if held.where == HERE and held.kind in needs.models),
    ]


def _scoring(out: Memory, needs: Needs, read: Sequence[Held], run: Run, step: Step) -> None:
    """Hidden states of every model, a portion at a time where only numbers are read; those of one
    twice while they are put together.
    """
    whole = any(fact.whole_step for fact in needs.facts)
    at_once = step.positions if whole else min(step.positions, HELD)
    states = [
        (held.kind, held.share * at_once * held.shaped.hidden * kept_width(run, held))
        for held in read
    ]
    loss_reads = {m for m in needs.models if needs.kept(m)}
    loss_reads |= {"student"} if "live" in loss_reads else set()
    kept = sum(size for kind, size in states if kind in loss_reads)
    out.add("hidden states that the loss reads", kept, ("score", "learn"))
    out.add("hidden states of scored tokens", sum(size for _, size in states) - kept, ("score",))
    out.add(
        "hidden states being put together", max((size for _, size in states), default=0), ("score",)
    )
    out.add(
        "a pass without gradient",
        step.micro * max((pass_bytes(held, run) for held in read), default=0),
        ("score",),
    )


def kept_width(run: Run, held: Held) -> int:
    """Bytes of a number of the hidden states that are kept for a model's head: as it takes them."""
    products = held.product_width(products_of(run, held))
    return products if run.head_dtype is None else max(WIDTH["float32"], products)


def pass_bytes(held: Held, run: Run) -> int:
    """Bytes per token of the tensors of one layer that are alive at once, no gradient."""
    inner = held.product_width(products_of(run, held))
    outer = max(WIDTH["float32"], inner)
    return (
        2 * held.shaped.hidden * outer + (held.shaped.hidden + 3 * held.shaped.intermediate) * inner
    )


# ----------------------------------------------------------------------------------------- sampling


def _sampling(out: Memory, run: Run, student: Held, guide: Held | None, step: Step) -> None:
    """What writes the rollouts, and how many at once."""
    device = out.device
    room = run.sampler_settings.room(
        Sizes(
            student,
            guide,
            run.dtype,
            min(math.ceil(step.sampled), step.rollouts),
            step.longest,
            device.memory,
            out.free("sample"),
            device.gpu,
        )
    )
    if room is not None:
        out.rows = room.rows
        out.add(room.name, room.bytes, PHASES if room.always else ("sample",))


def _chunk(free: int, entries: int, device: Device) -> int:
    most = (
        min(max(free // CHUNK_BYTES // CHUNK_PART, CHUNK_ENTRIES), CHUNK_MOST)
        if device.gpu
        else CHUNK_ENTRIES
    )
    return min(most, entries) * CHUNK_BYTES
