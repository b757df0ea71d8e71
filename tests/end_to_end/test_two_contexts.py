"""A run whose responses are written under a privileged prompt, and learnt from under both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opdkit import UserError
from opdkit.base.files import read_lines
from opdkit.curricula import writer_of
from opdkit.objective.batch import Batch
from opdkit.objective.facts import LogpFact
from opdkit.run import build
from opdkit.run.build import prepare
from opdkit.train import loop
from opdkit.types import Rollout
from tests.end_to_end.conftest import Shop, write_rows


def pi_distill(shop: Shop, folder: Path, rows: list[dict[str, Any]], **arguments: Any) -> Any:
    return shop.run(
        folder / "run",
        method={"name": "pi_distill", "arguments": {"beta": 0.01, **arguments}},
        data=write_rows(folder / "rows.jsonl", rows),
        reward=shop.reward,
        sampling={"num_generations": 2, "max_completion_length": 6},
    )


def test_a_step_learns_from_each_response_twice(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"What is {i}?", "hint": f"the answer is {i}"} for i in range(4)]
    job, state = prepare(pi_distill(shop, tmp_path, rows))
    seen: list[tuple[list[Rollout], Batch]] = []
    gathered = loop.gather

    def gather(rollouts: list[Rollout], *arguments: Any, **settings: Any) -> Batch:
        seen.append((rollouts, gathered(rollouts, *arguments, **settings)))
        return seen[-1][1]

    monkeypatch.setattr(loop, "gather", gather)
    with job.recorder.trackers:
        loop.train_step(job, state)
    [(rollouts, batch)] = seen
    shown, plain = rollouts[::2], rollouts[1::2]
    assert [r.tokens for r in shown] == [r.tokens for r in plain] and len(plain) >= 4
    for a, b in zip(shown, plain):
        prompts = (job.tokenizer.decode(r.prompt) for r in (a, b))
        assert [r.row["hint"] in text for r, text in zip((a, b), prompts)] == [True, False]
    sampler, student = (batch.read(LogpFact(m)) for m in ("sampler", "student"))
    assert (sampler[::2] == sampler[1::2]).all() and (student[::2] == sampler[::2]).all()
    mask = batch.mask[1::2]
    # the same weights know less without the hint: other log-probs of the same tokens
    assert ((student[1::2] - sampler[1::2])[mask].abs() > 1e-6).float().mean() > 0.9
    [line] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["grad_norm"] > 0
    # what the student wrote counts once
    assert line["tokens/sampled_so_far"] == sum(len(r.tokens) for r in shown)


def test_a_row_without_a_hint_is_refused_before_anything_is_loaded(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "open_models", None)
    rows = [{"question": "What is 1?", "hint": "one"}, {"question": "What is 2?"}]
    with pytest.raises(UserError, match=r"nothing for the view hint to show.*take the row out"):
        prepare(pi_distill(shop, tmp_path, rows))


def test_the_privileged_prompt_may_be_a_template(shop: Shop, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "steps": f"count to {i}"} for i in range(4)]
    run = pi_distill(shop, tmp_path, rows, view="First {steps}.\n{prompt}")
    job, _ = prepare(run)
    prompt = job.collector.prompts[1]
    writer = writer_of(job.curriculum)
    assert writer.views == ("First {steps}.\n{prompt}",)
    shown = job.collector.viewed(prompt, writer.views[0])
    assert "First count to 1." in job.tokenizer.decode(shown.tokens)
    assert shown.question == prompt.question and shown.id != prompt.id
    with pytest.raises(UserError, match="there is no view 'hnt'; did you mean 'hint'"):
        prepare(pi_distill(shop, tmp_path, rows, view="hnt"))
