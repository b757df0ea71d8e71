"""Annotators in whole runs: who is refused, that what they write is read, and that a run which was
stopped goes on bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import opdkit
from opdkit import UserError
from opdkit.base import exact
from opdkit.models.held import ELSEWHERE
from opdkit.run.ask import ask
from opdkit.run.launch import execute
from opdkit.run.open import Given
from opdkit.run.plan.models import models_of
from opdkit.run.resume import record_of
from opdkit.run.settings import make_run
from opdkit.train.checkpoint import STATE
from tests.common.tiny import save_tiny
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows

METHOD = '''
from opdkit.objective import Divergence, Mark, Objective, Term
from opdkit.methods.method import Method


def marked(*, by="rules"):
    """Forward KL on key spans, reverse on error spans."""
    return Method(
        Objective(
            Term(Divergence("forward_kl"), weight=Mark("key")),
            Term(Divergence("reverse_kl"), weight=Mark("error")),
        ),
        annotate={"spans": {"kind": "spans", "by": by, "coverage": 0.5}} if by else {},
    )
'''


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("annotators")
    (folder / "reward.py").write_text(
        "def even(rollout):\n    return float(sum(rollout.tokens) % 2 == 0)\n"
    )
    (folder / "method.py").write_text(METHOD)
    rows = [{**row, "steps": [[0, 4, "start"]]} for row in gsm8k_rows(4)]
    return Shop(
        folder,
        save_tiny(folder / "student", seed=1),
        "",
        save_tiny(folder / "teacher", seed=3),
        write_rows(folder / "data.jsonl", rows),
        f"{folder / 'reward.py'}:even",
    )


def values(shop: Shop, output: Path, **more: Any) -> dict[str, Any]:
    return shop.values(
        output,
        **{"reward": shop.reward, "method": f"{shop.folder / 'method.py'}:marked", **more},
    )


def refused(given: dict[str, Any]) -> str:
    """The error of a run whose models are nowhere: it came before any was loaded."""
    nowhere = {**given, "student": "/nowhere/student", "teacher": "/nowhere/teacher"}
    with pytest.raises(UserError) as error:
        execute(make_run(nowhere))
    return str(error.value)


def test_what_cannot_work_is_refused_before_a_model_is_loaded(shop: Shop, tmp_path: Path) -> None:
    name = f"{shop.folder / 'method.py'}:marked"
    told = refused(values(shop, tmp_path / "a", method={"name": name, "by": ""}))
    assert "reads the mark 'error' of tokens" in told and "annotate.spans=" in told
    told = refused(values(shop, tmp_path / "a", annotate={"spans": None}))
    assert "say who writes it: annotate.spans=" in told
    told = refused(values(shop, tmp_path / "a", reward=None))
    assert "annotate.spans (spans) goes by the rewards of responses" in told
    told = refused(values(shop, tmp_path / "a", annotate={"spans": "column:step"}))
    assert "reads the column 'step'" in told and "did you mean 'steps'" in told
    told = refused(values(shop, tmp_path / "a", annotate={"spans": {"by": "modle"}}))
    assert "did you mean 'model'" in told
    told = refused(values(shop, tmp_path / "a", annotate={"spans": {"by": "gone.py:f"}}))
    assert "gone.py" in told
    told = refused(
        values(shop, tmp_path / "a", annotate={"x": {"kind": "skills", "by": "cached:c"}})
    )
    assert "annotate.x='cached:c' is a cached teacher" in told


def test_what_an_annotator_writes_is_what_the_method_reads(shop: Shop, tmp_path: Path) -> None:
    """With the column's spans of the first four characters, each term is about as many tokens as
    these hold, and about none where its rollouts are of the other kind.
    """
    run = make_run(values(shop, tmp_path / "a", annotate={"spans": "column:steps"}, sample_every=1))
    result = execute(run)
    for line in result.metrics:
        assert line["seconds/annotate"] >= 0
        assert line["loss"] > 0
    other = execute(make_run(values(shop, tmp_path / "b", sample_every=1)))
    assert [x["loss"] for x in other.metrics] != [x["loss"] for x in result.metrics]


ANNOTATE: dict[str, Any] = {
    "spans": {"by": "column:steps"},
    "debate": {"of": ["teacher", "again", "student"], "max_tokens": 4, "keep": 3},
    "skills": {"by": "rules", "keep": 2},
}


def test_stopped_and_resumed_is_the_run_that_was_never_stopped(shop: Shop, tmp_path: Path) -> None:
    """Debates, skills and their rewards are in the saved memory, and what models write is drawn
    again: same weights, same memory, same numbers.
    """
    more = {
        "annotate": ANNOTATE,
        "models": {"again": shop.student},
        "steps": 4,
        "checkpoint": {"every": 2},
        "sampling": {"num_generations": 2, "max_completion_length": 24, "stop": ["e"]},
    }
    whole = execute(make_run(values(shop, tmp_path / "whole", **more)))
    execute(make_run(values(shop, tmp_path / "half", **{**more, "steps": 2})))
    half = execute(make_run(values(shop, tmp_path / "half", **more)), resume=True)

    def told(result: Any) -> list[tuple[float, ...]]:
        return [(x["loss"], x["reward/mean"]) for x in result.metrics]

    assert told(half) == told(whole) and len(told(whole)) == 4
    assert all(loss > 0 for loss, _ in told(whole))
    states = [
        exact.loads((tmp_path / name / "checkpoint-4" / STATE).read_text())
        for name in ("whole", "half")
    ]
    assert states[0]["memory"] == states[1]["memory"]
    memory = states[0]["memory"]
    assert len(memory["debates"]) == 3
    assert any(task["skills"] and task["read"] for task in memory["skills"].values())
    weights = [
        (tmp_path / name / "checkpoint-4" / "model.safetensors").read_bytes()
        for name in ("whole", "half")
    ]
    assert weights[0] == weights[1]


def test_other_annotators_are_another_run(shop: Shop, tmp_path: Path) -> None:
    given = values(shop, tmp_path / "run", steps=1)
    execute(make_run(given))
    changed = {**given, "steps": 2, "annotate": {"spans": {"coverage": 0.3}}}
    with pytest.raises(UserError, match=r"annotate.spans.coverage: 0.5 in the checkpoint, 0.3 now"):
        execute(make_run(changed), resume=True)
    assert json.dumps(opdkit.Run(**{k: given[k] for k in ("student", "teacher", "data")}).annotate)


def test_a_plan_holds_the_models_that_write(shop: Shop, tmp_path: Path) -> None:
    """One that also teaches counts once; a server is elsewhere; the student is there already."""
    more = {
        "debate": {"of": ["teacher", "student", shop.teacher, "server:http://127.0.0.1:1"]},
        "skills": "student",
    }
    run = make_run(values(shop, tmp_path / "run", annotate=more))
    plain = make_run(values(shop, tmp_path / "run"))
    held, before = (models_of(r, r.method_spec.load()) for r in (run, plain))
    assert held[: len(before)] == before
    new = [(h.role, h.name, h.own) for h in held[len(before) :]]
    assert new[:2] == [("annotate.debate", shop.teacher, False)] * 2
    assert [h.where for h in held[-1:]] == [ELSEWHERE] and len(new) == 3


def test_a_server_that_moved_is_the_same_writer(shop: Shop, tmp_path: Path) -> None:
    """Recorded is which model it is; another model, or none, is another run."""

    def recorded(by: Any) -> Any:
        run = make_run(values(shop, tmp_path / "run", annotate={"skills": {"by": by}}))
        return record_of(run, Given(), ask(run, Given()))["annotate"]["skills"]

    urls = [{"kind": "server", "urls": [f"http://127.0.0.1:{n}"], "model": "m"} for n in (1, 2)]
    one, two = map(recorded, urls)
    assert one == two != recorded({**urls[0], "model": "n"})
    assert one not in (recorded("student"), recorded("rules"), recorded(shop.teacher))
