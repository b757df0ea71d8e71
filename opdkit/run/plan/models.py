"""Which models a run holds, where, and in what precision: what `engines` will load, without loading
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from opdkit.methods.method import Method
from opdkit.models.quantize import BYTES
from opdkit.run.open import INTERNAL
from opdkit.run.plan.shapes import Shape, shape_of
from opdkit.run.settings import Run
from opdkit.sampling.vllm import VllmSettings
from opdkit.teachers.kinds import Cached, Local, Mixture, Server, Spec, Vllm, specs

WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}  # bytes of a number
HERE, ENGINE, ELSEWHERE = "in this process", "in a vLLM engine on this device", "elsewhere"


@dataclass(frozen=True)
class Held:
    """A model that a run reads."""

    role: str  # as the objective calls it; one of several teachers behind a dot
    name: str
    where: str
    shape: Shape | None = None  # None for one elsewhere
    dtype: str = ""  # of its weights
    own: bool = True  # False: its weights are those of a model named before
    quantize: str | None = None
    offload: bool = False  # it waits on the CPU, its head apart
    share: float = 1.0  # of the rollouts that it scores
    engine: float = 0.0  # share of the device that its engine takes

    @property
    def kind(self) -> str:
        """The objective's name for it."""
        return self.role.partition(".")[0]

    @property
    def shaped(self) -> Shape:
        assert self.shape is not None, f"{self.role} is elsewhere"
        return self.shape

    @property
    def weights(self) -> int:
        """Bytes of its weights in this process."""
        return (
            stored(self.shaped, self.dtype, self.quantize) if self.where == HERE and self.own else 0
        )

    @property
    def numbers(self) -> str:
        """How its weights are stored, in words."""
        return self.dtype if self.quantize is None else f"{self.quantize} and {self.dtype}"


def stored(shape: Shape, dtype: str, quantize: str | None) -> int:
    """Bytes of a model's weights; quantised are the linear layers but the head."""
    if quantize is None:
        return shape.parameters * WIDTH[dtype]
    inner = sum(x.inputs * x.outputs for x in shape.linears)
    scales = 4 * sum(x.outputs for x in shape.linears) if quantize == "8bit" else 0
    return round(inner * BYTES[quantize]) + scales + (shape.parameters - inner) * WIDTH[dtype]


def student_dtype(run: Run) -> str:
    """Of the weights: those that learn stay float32 under bfloat16 products, frozen ones below
    adapters do not.
    """
    return "float32" if run.dtype == "bfloat16" and run.lora is None else run.dtype


def engine_width(run: Run, spec: VllmSettings, student: Held) -> int:
    """Bytes of a number in the engine that samples: see `run.open.Models.sampler`."""
    return (
        4
        if (spec.dtype or ("bfloat16" if run.dtype == "bfloat16" else student.dtype)) == "float32"
        else 2
    )


def models_of(run: Run, method: Method) -> list[Held]:
    """The student first, then every model that the objective, or the evaluation, reads."""
    shape = shape_of(run.student, run.trust_remote_code)
    student = Held(
        "student",
        run.student,
        HERE,
        shape,
        student_dtype(run),
        quantize=run.lora.quantize if run.lora else None,
    )
    wanted = method.needs.models - INTERNAL
    if run.evaluate is not None and run.evaluate.teacher:
        wanted |= {"teacher"}
    others: list[Held] = []
    for name in sorted(wanted):
        if name == "teacher":
            others += _teachers(run)
        elif name == "reference" and run.reference is None:
            shared = run.lora is not None  # the student with its adapters switched off
            dtype = student.dtype if shared else run.teacher_dtype or run.dtype
            others.append(replace(student, role=name, dtype=dtype, own=not shared))
        else:
            others.append(
                _held(
                    name,
                    Local(str(run.reference if name == "reference" else run.models[name])),
                    run,
                )
            )
    seen = [(held.where, held.name, held.numbers, held.offload) for held in others]
    return [
        student,
        *(
            replace(held, own=held.own and seen.index(seen[i]) == i)
            for i, held in enumerate(others)
        ),
    ]


def _teachers(run: Run) -> Iterator[Held]:
    routes = specs(run.teachers)
    for name, spec in routes.items():
        role, share = ("teacher", 1.0) if len(routes) == 1 else (f"teacher.{name}", 1 / len(routes))
        members = (
            {f"{role}.{part}": member for part, member in spec.teachers.items()}
            if isinstance(spec, Mixture)
            else {role: spec}
        )
        for part, member in members.items():
            yield _held(part, member, run, share)


def _held(role: str, spec: Spec, run: Run, share: float = 1.0) -> Held:
    if isinstance(spec, Server):
        return Held(role, f"server {', '.join(spec.urls)}", ELSEWHERE, share=share)
    if isinstance(spec, Cached):
        return Held(role, f"cache {spec.folder}", ELSEWHERE, share=share)
    assert isinstance(spec, (Local, Vllm))
    shape = shape_of(spec.model, run.trust_remote_code)
    if isinstance(spec, Vllm):
        return Held(
            role,
            spec.model,
            ENGINE,
            shape,
            spec.dtype or "bfloat16",
            share=share,
            engine=spec.gpu_memory_utilization,
        )
    dtype = spec.dtype or run.teacher_dtype or run.dtype
    return Held(
        role,
        spec.model,
        HERE,
        shape,
        dtype,
        quantize=spec.quantize,
        offload=spec.offload,
        share=share,
    )
