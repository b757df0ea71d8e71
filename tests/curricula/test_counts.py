"""What a plan reckons a step to have is what its writer brings, and what it samples for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from opdkit.curricula import Curriculum, Rehearsal, curriculum_of, writer_of
from opdkit.curricula.recall import kept
from opdkit.curricula.rehearsal import REHEARSAL
from opdkit.curricula.together import join
from opdkit.curricula.two_contexts import TwoContexts
from opdkit.methods.explain import explain, passes
from opdkit.methods.method import load
from opdkit.types import Prompt, Rollout, Sampling
from tests.curricula.context import context

PROMPTS = tuple(Prompt(name, [5, 6], {"id": name}) for name in "abc")


def counted(curriculum: Curriculum, number: int, **changes: Any) -> tuple[int, int]:
    """Rollouts of a step of three prompts, and responses that were sampled for it."""
    sampled = []

    def sample(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        made = [
            Rollout(f"{p.id}/{i}", [5], [7], [True], [-1.0], [-1.0], p.group)
            for p in prompts
            for i in range(sampling.num_generations)
        ]
        sampled.extend(made)
        return made

    where = {
        "sample": sample,
        "sample_as": lambda model, *asked: sample(*asked),
        "pair": lambda prompt: (([8, 2], "yes"), ([4, 2], "no")),
        "reference": lambda prompt: [8, 9, 2],
        "viewed": lambda prompt, view: replace(prompt, id=f"{prompt.id}:{view}"),
        "stored": lambda prompt: sample([prompt], Sampling(num_generations=number)),
    }
    sampling = Sampling(num_generations=number)
    writer = writer_of(curriculum)
    made = writer.write(context(PROMPTS, sampling=sampling, **where | changes))
    return len(made), 0 if writer.stored else len(sampled)


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize(
    "said",
    [
        "fixed",
        "preference",
        {"kind": "preference", "online": 2},
        "opponent",
        {"kind": "teacher_prefix", "extra": 2},
        {"kind": "mixed", "student_share": 0.0},
        TwoContexts(),
        load("hypo").curriculum,
        load("nash_mp").curriculum,
        load("vla_opd").curriculum,
        load("sft").curriculum,
        load("lightning_opd").curriculum,
    ],
    ids=str,
)
def test_a_step_has_what_its_writer_says(said: Any, number: int) -> None:
    curriculum = said if not isinstance(said, (str, dict)) else curriculum_of(said)
    rollouts, sampled = counted(curriculum, number)
    writer, sampling = writer_of(curriculum), Sampling(num_generations=number)
    assert writer.rollouts(sampling) * 3 == rollouts
    assert writer.sampled(sampling) * 3 == sampled


def test_batches_of_the_data_are_sampled_by_nobody() -> None:
    mixed = writer_of(curriculum_of({"kind": "mixed", "student_share": 0.25}))
    four = Sampling(num_generations=4)
    assert (mixed.sampled(four), mixed.rollouts(four)) == (1, 4)  # of a quarter of them; at most


@pytest.mark.parametrize(("rehearsed", "many"), [(None, 6), (4, 4)])
def test_what_is_rehearsed_stands_beside_them(rehearsed: int | None, many: int) -> None:
    pool = [kept(Rollout(f"{i}", [5], [7], [True], [-1.0], [-1.0], "g")) for i in range(60)]
    made = Rehearsal(rehearsed=rehearsed)
    had = made.recalled(3, 0, 0, {REHEARSAL: {"pool": pool}}).beside
    assert len(had) == made.beside(3) == many
    both = join(made, curriculum_of("pass_rate"), ("a", "b"))
    assert both.beside(3) == many and both.before == made.before != ""
    assert "8 responses to every prompt" in explain("dph_rl")
    assert "before the first step" not in explain("grpo")


def test_what_nobody_drew_takes_a_pass_of_the_student_first() -> None:
    """No sampler noted how probable the responses of the data are."""
    for name in ("f_dpo", "hypo"):
        assert "student, without gradient" in passes(load(name))[0]
    assert "student, without gradient" not in passes(load("f_dpo", pairs="rollouts"))[0]
    assert len(passes(load("sft"))) == 1  # it reads nothing of the student before it learns
