"""Runs that learn from rollouts of earlier steps: what they load, learn and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.files import read_lines
from opdkit.curricula.recall import again
from opdkit.models import load as loading
from opdkit.models.load import load_model
from opdkit.objective import LogpFact, Previous, Snapshot
from opdkit.objective.needs import Needs
from opdkit.run.build import prepare
from opdkit.teachers import LocalModel
from opdkit.train.gather import gather
from opdkit.train.loop import train, train_step
from tests.end_to_end.conftest import Shop

DPH = "dph_rl(samples=4, enough=2, rehearsed=2, eta=1.0)"


def trained(shop: Shop, folder: Path, **settings: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Job, state and metrics of a run that has ended."""
    run = shop.run(folder, reward=shop.reward, teacher=None, sample_every=1, **settings)
    job, state = prepare(run)
    with job.recorder.trackers:
        state = train(job, state)
    return job, state, read_lines(folder / "metrics.jsonl")


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["all weights", "LoRA"])
def test_rehearsal_starts_at_zero_and_loads_no_reference(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    """What was stored is what the student says of it as it begins, to the sampler's rounding."""
    names: list[str] = []

    def counted(name: str, **settings: Any) -> Any:
        names.append(name)
        return load_model(name, **settings)

    monkeypatch.setattr(loading, "load_model", counted)
    settings = {"method": DPH, "steps": 4, "lora": lora, "keep_samples": 99}
    _, state, lines = trained(shop, tmp_path / "run", **settings)
    assert names == [shop.student]
    lost = [line["loss/rehearsal"] for line in lines]
    assert abs(lost[0]) < 1e-6 < lost[-1]
    explore = set(state.memory["rehearsal"]["explore"])
    for line in lines:
        samples = read_lines(tmp_path / "run" / "samples" / f"step_{line['step']:06d}.jsonl")
        stored = [s for s in samples if s["id"].startswith("rehearsal/")]
        written = [s for s in samples if s not in stored]
        assert 0 < len(stored) <= 2 and {s["id"].split("/")[1] for s in written} <= explore
        assert all(s["reward"] == 1.0 for s in stored)
        # reports are about what the step wrote
        assert line["reward/mean"] == pytest.approx(sum(s["reward"] for s in written) / 4)
        assert line["tokens/of_earlier_steps"] == sum(len(s["pieces"]) for s in stored)
    assert lines[-1]["tokens/sampled_so_far"] == state.tokens
    assert lines[0]["curriculum/rehearsal_tokens"] > 0


def test_what_is_stored_is_what_a_reference_would_say(shop: Shop, tmp_path: Path) -> None:
    """The student as it began, of what it wrote then; a run that names it asks it."""
    job, state, _ = trained(shop, tmp_path / "run", method=DPH, steps=1)
    rows = [again(row) for row in state.memory["rehearsal"]["pool"]]
    run = shop.run(tmp_path / "b", reward=shop.reward, method=DPH, reference=shop.student)
    named, _ = prepare(run)
    wanted = LogpFact("reference")
    stored, asked = (
        gather(rows, Needs(frozenset({wanted})), {"reference": made.scorers["reference"]}).facts[
            wanted
        ]
        for made in (job, named)
    )
    assert isinstance(named.scorers["reference"], LocalModel)
    assert len(rows) > 0 and stored.abs().sum() > 1
    torch.testing.assert_close(stored, asked, rtol=0, atol=1e-5)


def test_passes_anchors_and_replay_end_where_the_anchor_is_moved(
    shop: Shop, tmp_path: Path
) -> None:
    """Three steps of two updates, two of one; the anchor is then the student of the fourth."""
    settings = {
        "method": "remix(p=0.5, utd=2, reincarnate=3, beta=1.0)",
        "prompts_per_step": 4,
        "optim": {"learning_rate": 1e-3, "schedule": "linear", "max_grad_norm": None},
        "steps": 5,
        "keep_samples": 99,
    }
    job, state, lines = trained(shop, tmp_path / "run", **settings)
    assert job.student.updates == 3 * 2 + 2 == state.updates
    # the last update of each step, of eight that there will have been from the first step on
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-3 * (1 - n / 8) for n in (1, 3, 5, 6, 7)])
    replayed = [line.get("tokens/of_earlier_steps", 0) for line in lines]
    assert replayed[0] == 0 < min(replayed[1:3]) and replayed[3:] == [0, 0]
    assert abs(lines[3]["loss/k3_1"]) < 1e-7 < lines[2]["loss/k3_1"]
    assert state.memory["recent"]["groups"] == []
    for number, written in enumerate((4, 2, 2, 4, 4), start=1):
        samples = read_lines(tmp_path / "run" / "samples" / f"step_{number:06d}.jsonl")
        new = [s["id"] for s in samples if s["id"].startswith(f"{number - 1}/")]
        assert len(samples) == 8 and len(new) == 2 * written


def test_the_copies_are_the_students_of_these_steps(shop: Shop, tmp_path: Path) -> None:
    run = shop.run(
        tmp_path / "run", reward=shop.reward, method="remix(reincarnate=2, beta=0.5)", steps=4
    )
    job, state = prepare(run)
    students: list[dict[str, torch.Tensor]] = []
    with job.recorder.trackers:
        for step in range(4):
            students.append(
                {n: p.detach().clone() for n, p in job.student.model.named_parameters()}
            )
            copies = {spec.model: made.weights for spec, made in job.companions.items()}  # type: ignore[attr-defined]
            for name, of in (
                ("reference", 0 if step < 2 else 2),
                ("previous", max(step - 1, 0)),
            ):
                assert all(torch.equal(w, students[of][n]) for n, w in copies[name].items())
            train_step(job, state)
    assert set(job.companions) == {Snapshot(2), Previous()}
