"""What passes without teaching anything is said, once, after three steps in a row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from opdkit.objective import LogRatio, PolicyGradient, Term
from opdkit.objective.batch import Batch
from opdkit.objective.facts import LogpFact
from opdkit.train.idle import Idle
from opdkit.train.record import Recorder, StepRecord
from opdkit.train.track import Trackers
from opdkit.types import Rollout


def test_each_kind_is_said_once_after_three_steps_in_a_row() -> None:
    idle = Idle(by_reward=True)
    good = {"grad_norm": 0.1, "reward/std": 0.5, "completions/truncated_fraction": 0.9}
    for name, value, word in (
        ("grad_norm", 0.0, "the gradient is zero"),
        ("reward/std", 0.0, "the same reward"),
        ("completions/truncated_fraction", 1.0, "cut at max_completion_length"),
    ):
        bad = good | {name: value}
        said = [idle(m) for m in (bad, bad, good, bad, bad, bad, bad)]
        assert [len(s) for s in said] == [0, 0, 0, 0, 0, 1, 0] and word in said[5][0]
    assert not any(Idle(by_reward=False)(good | {"reward/std": 0.0}) for _ in range(5))


def test_a_sample_s_weights_are_those_of_all_terms(tmp_path: Path) -> None:
    """Two terms, of which the second trains the token that the first leaves out."""
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    facts = {LogpFact(m): torch.zeros(1, 2) for m in ("teacher", "student")}
    batch = Batch(tokens, torch.ones(1, 2, dtype=torch.bool), facts)
    term = Term(PolicyGradient(LogRatio("teacher", "student")))
    parts = [
        SimpleNamespace(term=term, weight=torch.tensor([[0.5, 0.0]])),
        SimpleNamespace(term=term, weight=torch.tensor([[1.0, 3.0]])),
    ]
    rollout = Rollout("0/a/0", [1], [0, 0], [True] * 2, [-1.0] * 2, [-1.0] * 2, "a")
    recorder = Recorder(tmp_path, Trackers([]), str)
    recorder.samples(1, [rollout], batch, SimpleNamespace(parts=parts))  # type: ignore[arg-type]
    line = json.loads((tmp_path / "samples" / "step_000001.jsonl").read_text())
    assert line["weight"] == [1.5, 3.0]


def test_a_step_without_a_selected_token_has_a_loss_of_zero() -> None:
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    batch = Batch(tokens, torch.ones(1, 2, dtype=torch.bool), {})
    plan = SimpleNamespace(parts=(), mask=batch.mask, batch=batch)
    record = StepRecord(())
    record.close(plan, torch.zeros(()), 1e-3)  # type: ignore[arg-type]
    assert record.metrics(batch)["loss"] == 0.0
