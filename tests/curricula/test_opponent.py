"""An opponent that plays: who writes beside the student at which step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from opdkit.base.errors import UserError
from opdkit.curricula import Opposed, writer_of
from opdkit.types import Prompt, Rollout, Sampling
from tests.curricula.context import context

PROMPTS = (Prompt("a", [5, 6], {"id": "a"}), Prompt("b", [7], {"id": "b"}))


def test_the_copy_plays_at_even_steps_and_the_student_at_odd_ones() -> None:
    asked: list[str] = []

    def by(name: str) -> Any:
        def write(prompts: Any, sampling: Sampling) -> list[Rollout]:
            asked.append(name)
            return [
                Rollout(f"{len(asked)}/{p.id}/{i}", p.tokens, [3, i], [True] * 2, [-1.0] * 2,
                        [-1.0] * 2, p.group, text=f"{name} {len(asked)} {p.id} {i}", row=p.row)
                for p in prompts
                for i in range(sampling.num_generations)
            ]  # fmt: skip

        return write

    for step, who in ((0, "copy"), (1, "student"), (4, "copy"), (7, "student")):
        asked.clear()
        rollouts = Opposed("copy").writer.write(
            context(
                PROMPTS,
                step=step,
                sampling=Sampling(num_generations=2),
                sample=by("student"),
                sample_as=lambda name, *rest: by(name)(*rest),
            )
        )
        assert asked == ["student", who]
        assert [r.text for r in rollouts] == [f"student 1 {p} {i}" for p in "ab" for i in range(2)]
        # another response to the same prompt, of which nothing is learnt
        beside = [r.row["opponent"] for r in rollouts]
        assert [x["text"] for x in beside] == [f"{who} 2 {p} {i}" for p in "ab" for i in range(2)]
        assert all(x["tokens"] == [3, i % 2] for i, x in enumerate(beside))
        assert {x["by"] for x in beside} == {who} and {x["finish"] for x in beside} == {"stop"}
        assert "opponent" not in PROMPTS[0].row


def test_where_no_copy_is_there_it_says_so() -> None:
    with pytest.raises(UserError, match="'copy' is to write responses, and this step has none"):
        Opposed("copy").writer.write(context(PROMPTS))
    assert writer_of(Opposed("copy")).players == ("copy",) and Opposed().writer.own
    assert replace(Opposed(), model="x").writer.players == ("x",)
