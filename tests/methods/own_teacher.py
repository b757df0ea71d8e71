"""The average of a student, followed through optimiser steps from what a method says of its
teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import nn

from opdkit.objective import Around, Ema, Stepped

MASK = torch.ones(1, 1, dtype=torch.bool)


def followed(teacher: dict, students: Sequence[float]) -> list[float]:
    """The one weight of a teacher, as a method writes it for a run, before the first optimiser step
    and after each; of a student whose weight is `students` before the first and after each.
    """
    assert (teacher["kind"], teacher["weights"]) == ("self", "ema")
    ema = Ema(**{k: v for k, v in teacher.items() if k not in ("kind", "weights", "view")})
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, students[0])
    around = Around(
        lambda name: 1,
        torch.device("cpu"),
        torch.float64,
        model=model,
        scorer=lambda copy: SimpleNamespace(source=None),
    )
    copy = ema.build(around)
    seen = [copy.weights["weight"].item()]  # type: ignore[attr-defined]
    for updates, weight in enumerate(students[1:], 1):
        nn.init.constant_(model.weight, weight)
        copy.after_step(Stepped(None, MASK, updates=updates, model=model))
        seen.append(copy.weights["weight"].item())  # type: ignore[attr-defined]
    return seen
