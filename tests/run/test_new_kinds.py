"""A kind of teacher or sampler of one's own is one file and one line in a table: the examples in
`Teacher` and `SamplerSettings`, as they stand there, train.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import opdkit
from opdkit import UserError
from opdkit.data.cache import open_cache
from opdkit.run.launch import Result
from opdkit.run.open import Given
from opdkit.run.plan import find_device, plan
from opdkit.run.settings import make_run
from opdkit.sampling import kinds as samplers
from opdkit.sampling.settings import SamplerSettings
from opdkit.teachers import kinds as teachers
from opdkit.teachers.teacher import Teacher
from opdkit.types import Prompt
from tests.common.tiny import VOCAB, save_tiny
from tests.end_to_end.conftest import QUICK

TEACHER_IMPORTS = """
import math
from dataclasses import dataclass

import torch

from opdkit.models.held import ELSEWHERE, Held
from opdkit.models.identity import Identity
from opdkit.objective.facts import Fact, LogpFact
from opdkit.objective.supply import Tensors
from opdkit.teachers.base import Remote
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.teacher import Teacher
"""
SAMPLER_IMPORTS = """
from dataclasses import dataclass

from opdkit.sampling import HFSampler
from opdkit.sampling.hf_settings import HfSettings
from opdkit.sampling.settings import Pace, Room, SamplerContext, SamplerSettings, Sizes
from opdkit.types import Rollout, Sampler
"""


def example(documented: type[Any]) -> str:
    """The indented code of a docstring."""
    lines = (documented.__doc__ or "").splitlines()
    return dedent("\n".join(line for line in lines if line.startswith(" " * 8) or not line))


def module(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of its own, imported."""
    path = folder / f"{name}.py"
    path.write_text("from __future__ import annotations\n" + source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher of the example, in the table."""
    source = TEACHER_IMPORTS + example(Teacher)
    own = module(tmp_path, "uniform_teacher", source, monkeypatch)
    monkeypatch.setitem(teachers.KINDS, "uniform", own.UniformTeacher)


@pytest.fixture
def loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler of the example, in the table."""
    source = SAMPLER_IMPORTS + example(SamplerSettings)
    own = module(tmp_path, "loud_sampler", source, monkeypatch)
    monkeypatch.setitem(samplers.KINDS, "loud", own.LoudSettings)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("student") / "model", seed=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("teacher") / "model", seed=2)


def losses(result: Result) -> list[float]:
    return [line["loss"] for line in result.metrics]


PROMPTS = [{"prompt": "Tom has", "teacher": "a"}, {"prompt": "12 plus", "teacher": "b"}]


@pytest.mark.usefixtures("uniform")
def test_a_teacher_of_ones_own_trains(student: str, teacher: str, tmp_path: Path) -> None:
    """Alone, and by route beside another kind; the same steps as with its settings as a group."""
    run = opdkit.distill(student, f"uniform:{VOCAB}", PROMPTS, output=str(tmp_path / "a"), **QUICK)
    assert len(run.metrics) == 2 and all(math.isfinite(loss) for loss in losses(run))
    group = {"kind": "uniform", "tokens": str(VOCAB)}
    values = {"student": student, "teacher": group, "data": "in memory", **QUICK}
    again = opdkit.execute(
        make_run({**values, "output": str(tmp_path / "b")}),
        Given(rows=PROMPTS),
    )
    assert losses(again) == losses(run)
    routed = {"a": f"uniform:{VOCAB}", "b": teacher}
    mixed = opdkit.distill(student, routed, PROMPTS, output=str(tmp_path / "c"), **QUICK)
    assert len(mixed.metrics) == 2 and losses(mixed) != losses(run)


@pytest.mark.usefixtures("uniform")
def test_the_rest_of_the_package_knows_it(student: str, tmp_path: Path) -> None:
    """A plan, a cache with what the formula says, and what is refused."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Tom has"}\n{"prompt": "12 plus"}\n', encoding="utf-8")
    values = {"student": student, "teacher": f"uniform:{VOCAB}", "data": str(data), **QUICK}
    told = str(plan(make_run(values), find_device("cpu")))
    assert f"uniform over {VOCAB}" in told and "the teacher's own time, elsewhere" in told
    manifest = opdkit.cache_teacher(make_run(values), tmp_path / "cache")
    assert manifest.origin.teacher.name == f"uniform over {VOCAB} tokens"
    cache = open_cache(tmp_path / "cache")
    prompts = [Prompt(id, tokens.tolist()) for id, tokens in cache.prompts.items()]
    every = [rollout for prompt in prompts for rollout in cache.rollouts(prompt)]
    assert len(every) == 4
    for rollout in every:
        assert set(cache.scores(rollout).logp) == {np.float16(-math.log(VOCAB))}
    with pytest.raises(UserError, match="which a uniform teacher cannot say"):
        plan(make_run({**values, "method": "gkd"}), find_device("cpu"))
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        make_run({**values, "teacher": {"kind": "unifrom", "tokens": "3"}})


@pytest.mark.usefixtures("loud")
def test_a_sampler_of_ones_own_trains(
    student: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes with the student, so the run is that of `hf`, to the bit."""
    plain, own = (
        opdkit.distill(
            student, teacher, PROMPTS, sampler=kind, output=str(tmp_path / kind), **QUICK
        )
        for kind in ("hf", "loud")
    )
    assert losses(own) == losses(plain) and len(own.metrics) == 2
    assert capsys.readouterr().out.count("2 prompts") == 2
    values = {"student": student, "teacher": teacher, "data": "d", **QUICK}
    hf, loud = (
        plan(make_run({**values, "sampler": kind}), find_device("cpu")) for kind in ("hf", "loud")
    )
    assert (loud.memory.peak, loud.step_seconds) == (hf.memory.peak, hf.step_seconds)
