"""Two contexts: who writes, what the copy behind the plain prompt is, and what is then known of it
before the step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from opdkit.curricula import TwoContexts
from opdkit.methods.method import load
from opdkit.models.body import head_of
from opdkit.objective.facts import LogpFact
from opdkit.teachers import LocalModel
from opdkit.train.gather import gather
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.tiny import tiny_model
from tests.curricula.context import context
from tests.train.rows import naive_logps

PROMPTS = (Prompt("a", [5, 6]), Prompt("b", [7]))


def hinted(prompt: Prompt, view: str) -> Prompt:
    assert view == "hint"
    return replace(prompt, id=f"{prompt.id}:hint", tokens=[40, 41, 42, *prompt.tokens])


def by_student(prompts: Any, sampling: Sampling) -> list[Rollout]:
    """Responses of two tokens with log-probs that are made up."""
    return [
        Rollout(
            f"0/{p.id}/{i}",
            p.tokens,
            [10 + i, 2],
            [True] * 2,
            [-0.5 - i, -0.1],
            [-0.5 - i, -0.1],
            p.group,
            policy_version=3,
            question=p.question,
            row={"hint": "forty"},
        )
        for p in prompts
        for i in range(sampling.num_generations)
    ]


def written() -> list[Rollout]:
    writer = TwoContexts().writer
    told = context(PROMPTS, sampling=Sampling(num_generations=2), sample=by_student, viewed=hinted)
    return writer.write(told)


def test_every_response_is_there_behind_both_prompts() -> None:
    rollouts = written()
    shown, plain = rollouts[::2], rollouts[1::2]
    assert [r.id for r in shown] == [f"0/{p}:hint/{i}" for p in "ab" for i in range(2)]
    assert [r.id for r in plain] == [f"{r.id}/plain" for r in shown]
    assert [r.prompt for r in shown] == [[40, 41, 42, 5, 6]] * 2 + [[40, 41, 42, 7]] * 2
    assert [r.prompt for r in plain] == [[5, 6]] * 2 + [[7]] * 2
    for a, b in zip(shown, plain):
        for same in ("tokens", "trained", "logp", "drawn_logp", "group", "question", "row"):
            assert getattr(a, same) == getattr(b, same)
        assert a.marks == {"privileged": [True, True]} and b.marks == {}
    assert [r.group for r in shown] == ["a", "a", "b", "b"]
    assert len({r.id for r in rollouts}) == 8


def test_none_of_them_says_how_well_the_student_does_alone() -> None:
    assert not TwoContexts().writer.own and TwoContexts().writer.draws


def test_before_the_step_the_copy_is_the_student_under_the_plain_prompt() -> None:
    """What was recorded is that of the privileged prompt: of rollouts of this very policy it is the
    student's before the step there, and the sampler's in both rows.
    """
    rollouts, model = written(), tiny_model("qwen3", seed=1).double()
    asked: list[int] = []

    class Counted(LocalModel):
        def source(self, layout: Any, positions: torch.Tensor) -> Any:
            asked.extend((positions // 2).unique().tolist())
            return super().source(layout, positions)

    scorers = {"student": Counted(model, head_of(model), 65536)}
    needs = load("pi_distill").needs
    scored = [replace(r, reward=1.0) for r in rollouts]
    batch = gather(scored, needs, scorers, policy_version=3, dtype=torch.float64)
    recorded = torch.tensor([r.logp for r in rollouts], dtype=torch.float64)
    torch.testing.assert_close(batch.read(LogpFact("sampler")), recorded)
    before = batch.read(LogpFact("student"))
    torch.testing.assert_close(before[::2], recorded[::2])
    for row, rollout in list(enumerate(rollouts))[1::2]:
        said = naive_logps(model, rollout).gather(-1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(before[row], said, rtol=0, atol=1e-12)
        assert (before[row] - recorded[row]).abs().min() > 0.01
    assert asked == [1, 3, 5, 7]  # and no pass over what is known
