"""Which models a run holds, where, and in what precision: what `run.open` will load, without
loading it.
"""

from __future__ import annotations

from dataclasses import replace

from opdkit.methods.method import Method
from opdkit.models.held import HERE, Held
from opdkit.models.shapes import Shape, shape_of
from opdkit.run.settings import Run
from opdkit.teachers.local import LocalTeacher


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
    """The student first, then every model that the objective, or the evaluation, reads."""

    def shaped(name: str) -> Shape:
        return shape_of(name, run.trust_remote_code)

    student = Held(
        "student",
        run.student,
        HERE,
        shaped(run.student),
        student_dtype(run),
        quantize=run.lora.quantize if run.lora else None,
    )
    wanted = method.opened
    if run.evaluate is not None and run.evaluate.teacher:
        wanted |= {"teacher"}
    others: list[Held] = []
    usual = run.teacher_dtype or run.dtype
    for name in sorted(wanted):
        if name == "teacher":
            others += run.teachers.held(name, usual, shaped)
        elif name == "reference" and run.reference is None:
            shared = run.lora is not None  # the student with its adapters switched off
            dtype = student.dtype if shared else usual
            others.append(replace(student, role=name, dtype=dtype, own=not shared))
        else:
            model = str(run.reference if name == "reference" else run.models[name])
            others += LocalTeacher(model).held(name, usual, shaped)
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
