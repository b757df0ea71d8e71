"""Rollouts that are asked for ahead: by which weights, at which step they are learnt from, what is
kept of them, and that a sampler elsewhere writes while the trainer learns.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.base.files import read_lines
from opdkit.models.load import load_model, load_tokenizer
from opdkit.objective.grammar import Objective
from opdkit.run.launch import execute
from opdkit.run.open import Given
from opdkit.run.settings import make_run
from opdkit.sampling.kinds import KINDS
from opdkit.train import loop
from opdkit.train.collect.ahead import Queue
from opdkit.train.record import TIMINGS
from tests.common.copy_sampler import CopySettings
from tests.common.fake_sampler import Vllm
from tests.common.fake_server import Fault
from tests.end_to_end.conftest import Shop
from tests.end_to_end.crash import assert_same

STEPS = 6


@pytest.fixture(autouse=True)
def copied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(KINDS, "copy", CopySettings)
    monkeypatch.setattr(CopySettings, "opened", [])
    yield


def values(shop: Shop, output: Path, ahead: int, **settings: Any) -> dict[str, Any]:
    given = {"steps": STEPS, "method": "grpo", "reward": shop.reward, "dtype": "float64"}
    return shop.values(output, ahead=ahead, **given | settings)


def lines(folder: Path) -> list[dict[str, float]]:
    """The metrics of each step that are the same in equal runs."""
    return [
        {k: v for k, v in line.items() if not k.startswith(TIMINGS)}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("ahead", [1, 2])
def test_rollouts_are_as_many_steps_old_as_asked(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Those of step s are of the weights before step s - ahead, and no older: by the version that
    each carries, and by the metrics.
    """
    learnt: list[set[int]] = []
    gathered = loop.gather

    def heard(rollouts: Any, *args: Any, **settings: Any) -> Any:
        learnt.append({r.policy_version for r in rollouts})
        return gathered(rollouts, *args, **settings)

    monkeypatch.setattr(loop, "gather", heard)
    execute(make_run(values(shop, tmp_path / "run", ahead)))
    expected = [max(0, step - ahead) for step in range(STEPS)]
    assert learnt == [{version} for version in expected]
    lag = [line.get("lag/steps", 0) for line in lines(tmp_path / "run")]
    assert lag == [min(step, ahead) for step in range(STEPS)]
    updates = [line.get("lag/updates", 0) for line in lines(tmp_path / "run")]
    assert updates == lag  # one optimiser step each


def test_a_sampler_elsewhere_leads_to_the_same_run(shop: Shop, tmp_path: Path) -> None:
    """Written at once by the student, or beside the trainer by a copy of it, with filters that ask
    for more prompts: metrics and weights are the same.
    """
    more = {"dynamic_sampling": True, "sampling": {"num_generations": 4}}
    for name in ("hf", "copy"):
        run = values(shop, tmp_path / name, 2, sampler={"kind": name}, **more)
        execute(make_run(run | {"recompute_student": True}))
    assert lines(tmp_path / "hf") == lines(tmp_path / "copy")
    here, there = weights(tmp_path / "hf"), weights(tmp_path / "copy")
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_at_a_lag_of_nothing_a_sampler_elsewhere_writes_as_the_student(
    shop: Shop, tmp_path: Path
) -> None:
    for name in ("hf", "copy"):
        run = values(shop, tmp_path / name, 0, sampler={"kind": name}, recompute_student=True)
        execute(make_run(run))
    assert lines(tmp_path / "hf") == lines(tmp_path / "copy")
    assert all("lag/steps" not in line for line in lines(tmp_path / "copy"))


def test_it_writes_while_the_trainer_learns(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollouts of the second step are begun before the first is learnt from and ended after:
    each waits for the other, which one after the other could not.
    """
    learning, writing = threading.Event(), threading.Event()
    seen: list[bool] = []

    def before(step: int) -> None:
        if step == 1:
            writing.set()
            seen.append(learning.wait(30))

    plan = Objective.plan

    def planned(*args: Any) -> Any:
        if not learning.is_set():
            seen.append(writing.wait(30))
            learning.set()
        return plan(*args)

    monkeypatch.setattr(CopySettings, "before", staticmethod(before))
    monkeypatch.setattr(Objective, "plan", planned)
    execute(make_run(values(shop, tmp_path / "run", 1, sampler={"kind": "copy"}, steps=2)))
    assert seen == [True, True]
    [sampler] = CopySettings.opened
    assert sampler.calls == [
        ("staged", 0), ("sent", 0), ("sample", 0), ("sample", 1),
    ]  # fmt: skip
    spans = [json.loads(line)["spans"] for line in (tmp_path / "run" / "timeline.jsonl").open()]
    begun, ended = next(s[2:] for s in spans[1] if s[:2] == ["sampler", "sample"])
    learns, learnt = next(s[2:] for s in spans[0] if s[:2] == ["trainer", "learn"])
    assert begun < learnt and learns < ended
    waited = [line["seconds/wait"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(waited) == 2 and all(seconds >= 0 for seconds in waited)


def _trained(run: dict[str, Any], resume: bool, moment: str, step: int) -> None:
    from tests.end_to_end import crash

    KINDS["copy"] = CopySettings
    crash._train(run, resume, False, moment, step)


def _child(run: dict[str, Any], resume: bool = False, moment: str = "", step: int = 0) -> int:
    child = multiprocessing.get_context("forkserver").Process(
        target=_trained, args=(run, resume, moment, step)
    )
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


@pytest.mark.parametrize(
    ("kind", "moment"), [("hf", "after recording"), ("copy", "before the optimiser")]
)
def test_killed_and_resumed_it_is_the_run_that_was_never_killed(
    shop: Shop, tmp_path: Path, kind: str, moment: str
) -> None:
    """What was asked for and not yet learnt from is in the checkpoint: nothing is written twice,
    nothing by other weights, nothing lost.
    """
    more = {"sampler": {"kind": kind}, "checkpoint": {"every": 2, "keep": 9}}
    run = values(shop, tmp_path / "killed", 2, **more)
    assert _child(run, moment=moment, step=4) == -9
    assert _child(run, resume=True) == 0
    assert _child({**run, "output": str(tmp_path / "whole")}) == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")
    queue = json.loads((tmp_path / "whole" / "checkpoint-2" / "queue.json").read_text())
    assert [(entry["step"], entry["since"]) for entry in queue] == [(2, 0), (3, 1)]


def test_a_run_may_go_on_with_another_lag(shop: Shop, tmp_path: Path) -> None:
    """What was asked for is learnt from first; then the lag is the new one."""
    run = values(shop, tmp_path / "run", 2, steps=3)
    execute(make_run(run))
    execute(make_run({**run, "steps": 6, "ahead": 0}), resume=True, allow_changes=True)
    assert [line.get("lag/steps", 0) for line in lines(tmp_path / "run")] == [0, 1, 2, 0, 0, 0]
    longer = {**run, "steps": 9, "ahead": 1}
    execute(make_run(longer), resume=True, allow_changes=True)
    assert [line.get("lag/steps", 0) for line in lines(tmp_path / "run")][6:] == [0, 1, 1]


def test_what_was_asked_for_is_kept_by_a_run_that_asks_no_more_ahead() -> None:
    """A run went on with another lag: what it has left of the former one is in its checkpoints."""
    said = {"scored": [], "rollouts": [], "tokens": 5, "earlier": [], "version": 1}
    said |= {"stream": {}, "counts": {}}
    rows = [{"step": 3, "since": 1, **said}, {"step": 4, "since": 2, **said}]
    queue = Queue(None)  # type: ignore[arg-type]
    queue.load(rows)
    assert queue.state(3) == rows and queue.state(4) == rows[1:]
    queue.load([{"step": 5, "since": 5, **said}])
    assert queue.state(5) == []


def test_what_fails_beside_the_trainer_ends_the_run_and_keeps_what_was_learnt(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message, and the run goes on from the step that it had reached."""

    def before(step: int) -> None:
        if step == 3:
            raise UserError("the sampling server is gone")

    monkeypatch.setattr(CopySettings, "before", staticmethod(before))
    run = values(shop, tmp_path / "run", 1, sampler={"kind": "copy"})
    with pytest.raises(UserError, match="the sampling server is gone"):
        execute(make_run(run))
    assert len(lines(tmp_path / "run")) == 3
    assert "asked for ahead, are not kept" in capsys.readouterr().err
    monkeypatch.setattr(CopySettings, "before", staticmethod(lambda step: None))
    execute(make_run(run), resume=True)
    found = [(line["step"], line.get("lag/steps", 0)) for line in lines(tmp_path / "run")]
    assert found == [(1, 0), (2, 1), (3, 1), (4, 0), (5, 1), (6, 1)]


def test_old_text_is_weighed_by_what_the_student_says_of_it_now(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is read anew at rollouts that are older than it is, so that ratios are to what
    drew them: at a lag the first weights are not 1, without one they all are.
    """
    apart: list[float] = []
    gathered = loop.gather

    def heard(*args: Any, **settings: Any) -> Any:
        batch = gathered(*args, **settings)
        gap = batch["student"].logp - batch["sampler"].logp
        apart.append(gap[batch.mask].abs().max().item())
        return batch

    monkeypatch.setattr(loop, "gather", heard)
    for ahead in (0, 1):
        apart.clear()
        execute(make_run(values(shop, tmp_path / str(ahead), ahead, steps=3)))
        assert apart[0] < 1e-12
        assert [gap > 1e-4 for gap in apart[1:]] == [bool(ahead)] * 2


def test_a_lag_of_text_that_nobody_writes_is_refused(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it writes nothing: leave ahead out"):
        execute(make_run(values(shop, tmp_path / "run", 1, method="sft", teacher=None)))


def with_two_servers(shop: Shop, folder: Path, dies: int = 0, back: int = 0) -> None:
    """A run asked one step ahead, of which the first server ends after a step and comes back."""
    student, tokenizer = load_model(shop.student, "float32"), load_tokenizer(shop.student)
    with ExitStack() as stack:

        def start(port: int = 0) -> Vllm:
            return stack.enter_context(Vllm(copy.deepcopy(student), tokenizer, port=port))

        two = [start(), start()]

        def show(step: int, metrics: Any) -> None:
            if step == dies:
                two[0].faults = [Fault("die", at=0, times=0)]
                with suppress(httpx2.HTTPError):
                    httpx2.post(two[0].url, json={})
            if step == back:
                two[0] = start(two[0].port)

        urls = [server.url for server in two]
        more = {"dtype": "float32", "method": "opd"}
        sampler = {"kind": "server", "urls": urls, "retries": 0}
        execute(make_run(values(shop, folder, 1, sampler=sampler, **more)), Given(show=show))


def test_one_of_two_servers_ends_and_comes_back_while_a_run_goes_on(
    shop: Shop, tmp_path: Path
) -> None:
    """The other writes all meanwhile, the one that is back has the weights of now and is used
    again, and what is learnt is what two servers that never ended would have led to.
    """
    with_two_servers(shop, tmp_path / "whole")
    with_two_servers(shop, tmp_path / "broken", dies=2, back=4)
    used = [line["sampler/servers"] for line in lines(tmp_path / "broken")]
    assert used[0] == 2 and 1 in used and used[-1] == 2
    assert [line["sampler/servers"] for line in lines(tmp_path / "whole")] == [2.0] * STEPS
    here, there = weights(tmp_path / "broken"), weights(tmp_path / "whole")
    for name, weight in here.items():
        torch.testing.assert_close(weight, there[name], atol=1e-5, rtol=0)
