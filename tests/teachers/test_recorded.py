"""What rollouts carry of who wrote them, as a model of which nothing is loaded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opdkit import UserError, load
from opdkit.models.layout import Layout
from opdkit.objective import Entropy, Likelihood, LogpFact, LogRatio, Objective
from opdkit.objective.needs import Needs, needs
from opdkit.teachers.kinds import one_teacher_of
from opdkit.teachers.recorded import RecordedScorer, RecordedTeacher
from opdkit.train.gather import gather
from tests.train.rows import rollouts

REFERENCE = LogpFact("reference")


def test_it_says_what_was_noted_and_nothing_of_others() -> None:
    first, *others = rollouts()
    rows = [replace(first, marks={"rehearsal": [True] * 5}), *others]
    scorers = {"reference": RecordedScorer("rehearsal")}
    found = gather(rows, Needs(frozenset({REFERENCE})), scorers).facts[REFERENCE]
    assert found[0].tolist() == pytest.approx([-1.0, -1.1, -1.2, -1.3, -1.4, 0, 0, 0])
    assert found[1, :2].tolist() == [-math.inf] * 2
    positions = torch.tensor([3, 1])
    layout = Layout(rows, 8)
    values = scorers["reference"].facts([REFERENCE], layout, positions, {})[REFERENCE]
    assert values.tolist() == [-1.3, -1.1]


def test_its_words_and_what_it_cannot_say() -> None:
    made = one_teacher_of("recorded:rehearsal")
    assert made == RecordedTeacher("rehearsal") == one_teacher_of(made.said())
    assert made.held("reference", "float32", None) == []  # type: ignore[arg-type]
    made.refuse("dph_rl", load("dph_rl").needs, "reference")
    whole = Objective(Likelihood() * LogRatio("reference", "student") * Entropy("reference"))
    with pytest.raises(UserError, match="which a recorded teacher cannot say"):
        made.refuse("own", needs(whole), "reference")
