"""Which models a run holds, where, and in what precision: what `run.open` will load, without
loading it.
"""

from __future__ import annotations

from dataclasses import replace

from opdkit.methods.method import Method
from opdkit.models.held import HERE, Held
from opdkit.models.shapes import Shape, shape_of
from opdkit.run.annotate import annotations_of, writers_for
from opdkit.run.settings import Run
from opdkit.teachers.own import STUDENT


def student_dtype(run: Run) -> str:
    """Of the weights: those that learn stay float32 under bfloat16 products, frozen ones below
    adapters do not.
    """
    return "float32" if run.dtype == "bfloat16" and run.lora is None else run.dtype


def products_of(run: Run, held: Held) -> str:
    """The type of a model's matrix products: the student's are of the run's, whatever its weights
    are stored in; those of frozen models of their weights'.
    """
    return run.dtype if held.role == "student" else held.dtype


def models_of(run: Run, method: Method) -> list[Held]:
    """The student first, then every model that the objective or the evaluation reads, or that
    writes for an annotator.
    """

    def shaped(name: str) -> Shape:
        return shape_of(run.student if name == STUDENT else name, run.trust_remote_code)

    student = Held(
        "student",
        run.student,
        HERE,
        shaped(run.student),
        student_dtype(run),
        quantize=run.lora.quantize if run.lora else None,
    )
    wanted = run.opened_by(method)
    others: list[Held] = []
    usual = run.teacher_dtype or run.dtype
    for name in sorted(wanted):
        for held in run.model_named(name).held(name, usual, shaped):
            others.append(_of_student(held, student, run) if held.name == STUDENT else held)
    for name, settings in annotations_of(run, method).items():
        for writer in writers_for(run, name, settings).values():
            others += writer.held(f"annotate.{name}", usual, shaped)
    # copies of the student, whose weights are counted by what they hold of their own
    read = sorted(method.brought & method.needs.models)
    others += [replace(student, role=name, own=False) for name in read]
    seen = [(held.where, held.name, held.numbers, held.offload) for held in others]
    return [
        student,
        *(
            replace(held, own=held.own and seen.index(seen[i]) == i)
            for i, held in enumerate(others)
        ),
    ]


def _of_student(held: Held, student: Held, run: Run) -> Held:
    """The student as its own teacher: with adapters its initial weights are those below them."""
    own = held.own and run.lora is None
    return replace(student, role=held.role, dtype=held.dtype if own else student.dtype, own=own)
