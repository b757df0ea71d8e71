"""Runs of ten steps with vLLM as sampler or as teacher: what the student learns from is what
Hugging Face says, and the weights follow.

At each step the facts are gathered twice, as the run does it and with both models of transformers
in this process. Tolerances, float32: the two implementations add up in other orders, which moved no
log-prob by more than 6e-6 nats where this was written, and the gradient, which is linear in them,
by 2e-6 of its norm; allowed is what the roundings of a forward pass may add up to, of credits of
0.2 nats or more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.models.body import head_of
from opdkit.models.layout import Layout
from opdkit.models.load import load_model
from opdkit.models.tokenizers import real_vocabulary
from opdkit.objective.batch import Batch
from opdkit.objective.facts import LogpAtFact, LogpFact, TopFact
from opdkit.objective.head import flat_positions, learn
from opdkit.run.build import prepare
from opdkit.run.settings import make_run
from opdkit.teachers import LocalModel
from opdkit.train import loop
from opdkit.train.gather import gather
from opdkit.train.job import Job
from tests.common.rounding import FORWARD
from tests.vllm.conftest import SMALL

pytestmark = pytest.mark.vllm

CLOSE, SHARE = FORWARD, FORWARD / 0.2
STEPS = 10


@dataclass
class Watch:
    """The largest differences seen over the steps of a run."""

    steps: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    gradient: float = 0.0  # share of its norm
    # after each update: the engine from the trainer
    probes: list[float] = field(default_factory=list)
    # after each update: the trainer from its former self
    moved: list[float] = field(default_factory=list)

    def see(self, name: str, difference: float) -> None:
        self.facts[name] = max(self.facts.get(name, 0.0), difference)


def gradient(job: Job, batch: Batch, rollouts: Any) -> Tensor:
    """Of the run's objective, as the loop takes it."""
    plan = job.objective.plan(batch, None)
    layout = Layout(rollouts, batch.shape[1])
    with job.student.learning(job.seed):
        for positions in layout.micro_batches(
            flat_positions(plan.selected), job.micro_batch_tokens
        ):
            learn(
                plan, positions, layout.states(job.student.model, positions), job.student.head
            ).loss.backward()
    flat = torch.cat([p.grad.flatten() for p in job.student.parameters if p.grad is not None])
    job.student.optimiser.zero_grad(set_to_none=True)
    return flat


def follow(
    values: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Job, Watch]:
    """A run, watched."""
    job, state = prepare(make_run(values))
    vocabulary = real_vocabulary(job.tokenizer)
    model = load_model(teacher)
    local: dict[str, Any] = {
        **job.scorers,
        "teacher": LocalModel(model, head_of(model, vocabulary)),
    }
    watch = Watch()

    def twice(rollouts: Any, needs: Any, scorers: Any, **given: Any) -> Batch:
        batch = gather(rollouts, needs, scorers, **given)
        own = gather(rollouts, needs, local, **(given | {"recompute_student": True}))
        mask = batch.mask
        for fact, values in own.facts.items():
            if isinstance(fact, (LogpFact, LogpAtFact)):
                watch.see(str(fact), float((batch.facts[fact] - values)[mask].abs().max()))
            # ids whose log-probs are equal up to rounding may change places
            if isinstance(fact, TopFact):
                assert float((batch.facts[fact] != values)[mask].double().mean()) < 0.02
        if LogpFact("sampler") in batch.facts and LogpFact("student") in own.facts:
            gap = (batch.facts[LogpFact("sampler")] - own.facts[LogpFact("student")])[mask]
            watch.see("sampler from student", float(gap.abs().max()))
        ours, theirs = gradient(job, batch, rollouts), gradient(job, own, rollouts)
        assert float(theirs.norm()) > 0
        watch.gradient = max(watch.gradient, float((ours - theirs).norm() / theirs.norm()))
        watch.steps += 1
        return batch

    sampler: Any = job.collector.sampler
    sync = sampler.sync

    def probed(student: Any, version: int) -> None:
        probe = sampler.servers.all[0].probe if hasattr(sampler, "servers") else sampler.probe
        before = probe._trainer
        sync(student, version)
        watch.probes.append(float(probe.gap))
        if before is not None:
            watch.moved.append(float((probe._trainer - before).abs().mean()))

    if hasattr(sampler, "probe"):
        monkeypatch.setattr(sampler, "sync", probed)
    monkeypatch.setattr(loop, "gather", twice)
    loop.train(job, state)
    return job, watch


@pytest.fixture
def values(checkpoint: Callable[..., str], data: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "student": checkpoint(0),
        "teacher": checkpoint(7),
        "data": {"source": data, "chat": False},
        "output": str(tmp_path / "run"),
        "steps": STEPS,
        "prompts_per_step": 3,
        "sampling": {"num_generations": 2, "max_completion_length": 16},
        "optim": {"learning_rate": 1e-3},
        "device": "cpu",
    }


def assert_same(watch: Watch) -> None:
    assert watch.steps == STEPS and watch.facts
    assert max(watch.facts.values()) < CLOSE, watch.facts
    assert watch.gradient < SHARE


def assert_followed(watch: Watch) -> None:
    """After each update the engine was where the trainer is, which had moved a thousand times
    farther than they differ.
    """
    assert len(watch.probes) >= STEPS and len(watch.moved) >= STEPS
    assert max(watch.probes) < CLOSE and min(watch.moved) > 1e-3


@pytest.mark.parametrize(
    "lora", [None, False, True], ids=["weights", "adapters added", "adapters alone"]
)
def test_sampling_with_vllm_in_this_process(
    values: dict[str, Any], lora: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's log-probs before the step are the engine's here; by default the trainer would
    compute them again.
    """
    values["sampler"] = {"kind": "vllm", **SMALL, **({} if lora is None else {"enable_lora": lora})}
    values["recompute_student"] = False
    if lora is not None:
        values |= {"lora": {"r": 4}, "optim": {"learning_rate": 1e-2}}
    job, watch = follow(values, values["teacher"], monkeypatch)
    assert_same(watch)
    assert_followed(watch)
    assert job.collector.sampler.version == STEPS  # type: ignore[attr-defined]
    job.collector.sampler.close()  # type: ignore[attr-defined]


def test_sampling_from_a_server(
    values: dict[str, Any], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values |= {"sampler": f"server:{server}", "recompute_student": False}
    job, watch = follow(values, values["teacher"], monkeypatch)
    assert_same(watch)
    assert_followed(watch)
    assert job.collector.sampler.version == STEPS  # type: ignore[attr-defined]


METHODS = [
    ("opd", {"LogpFact(model='teacher')"}),
    (
        {"name": "opd", "k": 8, "support": "teacher"},
        {"LogpAtFact(model='teacher', owner='teacher', k=8)"},
    ),
]


@pytest.mark.parametrize(("method", "reads"), METHODS)
def test_a_teacher_in_a_vllm_engine(
    values: dict[str, Any],
    method: Any,
    reads: set[str],
    checkpoint: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = {
        "kind": "vllm",
        "model": checkpoint(7),
        "max_model_len": 384,
        "gpu_memory_utilization": 0.2,
        "enforce_eager": True,
    }
    job, watch = follow(values | {"teacher": teacher, "method": method}, checkpoint(7), monkeypatch)
    assert_same(watch)
    assert reads <= set(watch.facts)
    job.scorers["teacher"].close()  # type: ignore[union-attr]


@pytest.mark.parametrize(("method", "reads"), METHODS)
def test_a_teacher_behind_a_vllm_server(
    values: dict[str, Any],
    method: Any,
    reads: set[str],
    teacher_server: str,
    checkpoint: Callable[..., str],
    monkeypatch: Any,
) -> None:
    _, watch = follow(
        values | {"teacher": f"server:{teacher_server}", "method": method},
        checkpoint(7, 320),
        monkeypatch,
    )
    assert_same(watch)
    assert reads <= set(watch.facts)


@pytest.fixture(scope="module")
def teacher_server(serve: Callable[..., str], checkpoint: Callable[..., str]) -> str:
    # its head has no padding, which a server would give a share
    return serve(checkpoint(7, 320), "--max-logprobs", "32")
