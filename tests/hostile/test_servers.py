"""Faults of servers on both wires: each ends in one message that names rollout and server, in time
and in little memory, and nothing is learnt from wrong numbers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.models.body import head_of
from opdkit.objective.facts import EntropyFact, Fact, LogpAtFact, LogpFact, TopFact, VocabularyFact
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.server import ServerTeacher
from opdkit.teachers.service import Service
from opdkit.train.gather import gather
from tests.common.fake_server import FakeServer
from tests.common.tiny import tiny_model, tiny_tokenizer
from tests.hostile import faults
from tests.hostile.faults import KEY, Fault, Server
from tests.train.rows import rollouts

pytestmark = pytest.mark.hostile
OTHERS: tuple[Fact, ...] = (
    LogpFact("teacher"),
    TopFact("teacher", 3),
    LogpAtFact("teacher", "teacher", 3),
)
OWN: tuple[Fact, ...] = (*OTHERS, EntropyFact("teacher"), LogpAtFact("teacher", "student", 4))
TIMEOUT = 1.0
SECONDS = 4.0  # that a fault may take
MEMORY = 400 << 20  # bytes that a fault may take
FACTS = {"vLLM's wire": OTHERS, "our own wire": OWN, "hidden states": (VocabularyFact("teacher"),)}
TOKENIZER = tiny_tokenizer()


def truth(wire: str, seed: int = 2) -> FakeServer | Service:
    model = tiny_model("llama", seed=seed).eval()
    if wire == "vLLM's wire":
        return FakeServer(model, TOKENIZER)
    return Service(LocalModel(model, head_of(model)), TOKENIZER, "T")


def opened(server: Server, facts: tuple[Fact, ...]) -> Any:
    method: Any = SimpleNamespace(needs=Needs(frozenset(facts)), name="mine")
    settings: dict[str, Any] = {"retries": 0, "timeout": TIMEOUT, "api_key_env": "HOSTILE_KEY"}
    return ServerTeacher((server.url,), **settings).open(TeacherContext(method, TOKENIZER))


def step(teacher: Any, facts: tuple[Fact, ...]) -> list[torch.Tensor]:
    """What a step reads: facts, or hidden states."""
    student = tiny_model("qwen3", seed=1)
    local = LocalModel(student, head_of(student))
    wanted = [f for f in facts if not isinstance(f, VocabularyFact)] or [LogpFact("teacher")]
    batch = gather(rollouts(), Needs(frozenset(wanted)), {"student": local, "teacher": teacher})
    return [batch.read(fact) for fact in wanted]


def peak() -> int:
    """The most memory that this process has had since the last call, bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    Path("/proc/self/clear_refs").write_text("5")
    return int(found[1]) << 10


def wrong(fault: Fault, act: Callable[[], Any], names: Iterable[str]) -> str:
    """What is wrong with how a fault ends; nothing where all is right."""
    peak()
    before, start = peak(), time.monotonic()
    try:
        act()
    except UserError as error:
        said = str(error)
        if missing := [name for name in names if name not in said]:
            return f"the message does not say {missing}: {said}"
        if KEY in said or not said.isprintable() or len(said) > 2000:
            return f"the message shows a key, is no line, or is long: {said!r}"
        if not re.search(r"[Ss]tart|check|[Uu]se|export|[Gg]ive|look|must|its key", said):
            return f"the message does not say what to do: {said}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "" if fault.harmless else "it passed unseen"
    if (took := time.monotonic() - start) > SECONDS:
        return f"it took {took:.1f} s"
    if (grown := peak() - before) > MEMORY:
        return f"it took {grown >> 20} MiB"
    return ""


def judged(title: str, results: dict[str, str]) -> None:
    """Prints the figures, and fails where one is wrong."""
    bad = {name: why for name, why in results.items() if why}
    print(f"\n{title}: {len(results)} faults, {len(bad)} wrong")
    assert not bad, "\n".join(f"{name}: {why}" for name, why in bad.items())


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTILE_KEY", KEY)


IN_A_STEP = {
    "vLLM's wire": [*faults.TRANSPORT, *faults.ON_JSON],
    "our own wire": [*faults.TRANSPORT, *faults.ON_TENSORS],
    "hidden states": [fault for fault in faults.ON_TENSORS if fault.of_states],
}


@pytest.mark.parametrize("wire", list(IN_A_STEP))
def test_faults_in_a_step(wire: str) -> None:
    facts, results = FACTS[wire], {}
    for fault in IN_A_STEP[wire]:
        with Server(truth(wire)) as server:
            teacher = opened(server, facts)
            right = step(teacher, facts)
            server.fault = fault
            results[fault.name] = wrong(
                fault, partial(step, teacher, facts), ("rollout", server.url)
            )
            server.fault = None
            again = step(teacher, facts)  # a fault leaves nothing behind
            assert all(torch.equal(a, b) for a, b in zip(right, again)), fault.name
    judged(f"{wire}, in a step", results)


AT_THE_START = {
    "vLLM's wire": [*faults.TRANSPORT, *faults.AT_START],
    "our own wire": [*faults.AT_START, *faults.AT_OWN_START],
    "hidden states": faults.AT_HEAD,
}


@pytest.mark.parametrize("wire", list(AT_THE_START))
def test_faults_at_the_start(wire: str) -> None:
    results = {}
    for fault in AT_THE_START[wire]:
        with Server(truth(wire), fault) as server:
            results[fault.name] = wrong(fault, partial(opened, server, FACTS[wire]), (server.url,))
    judged(f"{wire}, at the start", results)


@pytest.mark.parametrize("wire", list(FACTS))
def test_other_weights_under_the_same_name(wire: str) -> None:
    """Without any fault to be seen, and after one."""
    results, facts = {}, FACTS[wire]
    for fault in (None, faults.TRANSPORT[1]):
        with Server(truth(wire)) as server:
            teacher = opened(server, facts)
            step(teacher, facts)
            if fault is not None:
                server.fault = fault
                with pytest.raises(UserError):
                    step(teacher, facts)
            server.truth, server.fault = truth(wire, seed=3), None
            name = "restarted" if fault is None else "restarted after a fault"
            seen = Fault(name, lambda said: None)
            results[name] = wrong(seen, partial(step, teacher, facts), (server.url,))
    judged(f"{wire}, other weights", results)
