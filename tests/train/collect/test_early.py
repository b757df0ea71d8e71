"""Rollouts scored as each ends: the step reads the same numbers, and what it cannot use is asked
again or thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.models.body import head_of
from opdkit.objective.divergences import ReverseKL
from opdkit.objective.facts import Fact, GapFact, LogpAtFact, LogpFact, TopFact
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel
from opdkit.teachers.base import early
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.early import BEGUN, Begun
from opdkit.teachers.kinds import teacher_of
from opdkit.train.collect.early import Early, asked_of
from opdkit.train.gather import gather
from opdkit.train.mesh import Mesh
from opdkit.types import Rollout
from tests.common.fake_server import FakeServer
from tests.common.rounding import FORWARD
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.teachers.test_serve import serving, url
from tests.train.rows import rollouts
from tests.train.test_mesh import on_each

TOKENIZER = tiny_tokenizer()
OWN: tuple[Fact, ...] = (
    LogpFact("teacher"),
    TopFact("teacher", 3),
    LogpAtFact("teacher", "teacher", 3),
)
AT_STUDENTS = (*OWN, LogpAtFact("teacher", "student", 4))
WHOLE = (*OWN, GapFact(ReverseKL(), "student", "teacher"))


class Run:
    """A teacher as a run opens it, and what begins its requests."""

    def __init__(self, facts: Sequence[Fact], said: Any, tokenizer: Any = TOKENIZER):
        self.facts = facts
        method: Any = SimpleNamespace(needs=Needs(frozenset(facts)), name="mine", actions=None)
        context = TeacherContext(method, tokenizer)
        self.teacher: Any = teacher_of(said).open(context)
        student = tiny_model("qwen3", seed=1)
        self.scorers = {"student": LocalModel(student, head_of(student)), "teacher": self.teacher}
        self.begun: Begun | None = context.opened.get(BEGUN)
        if self.begun is not None:
            self.early = Early(self.begun, self.scorers, lambda step, total: method.needs)

    def begin(self, rows: Sequence[Rollout], step: int = 0) -> None:
        hear = self.early.hearing(step, 10)
        for row in rows:
            hear(row)
        self.early.begun.wait(row.id for row in rows)

    def step(self, rows: Sequence[Rollout]) -> Mapping[Fact, torch.Tensor]:
        batch = gather(rows, Needs(frozenset(self.facts)), self.scorers)
        return {fact: batch.read(fact) for fact in self.facts}


@contextmanager
def vllm() -> Iterator[FakeServer]:
    with FakeServer(tiny_model("llama", seed=2).eval(), TOKENIZER, at_ids=True) as server:
        yield server


def same(a: Mapping[Fact, torch.Tensor], b: Mapping[Fact, torch.Tensor], atol: float) -> None:
    assert set(a) == set(b)
    for fact in a:
        torch.testing.assert_close(a[fact], b[fact], rtol=0, atol=atol)


def about(server: FakeServer, rows: Sequence[Rollout]) -> int:
    """Requests about these rollouts; the others are of the text that shows the weights."""
    texts = [r.prompt + r.tokens for r in rows]
    return sum(body["prompt"] in texts for body in server.requests if "prompt" in body)


def test_the_step_reads_what_was_begun_and_asks_nothing_again() -> None:
    """To the bit, as each rollout has a request of its own either way. The weights are asked about
    after the answers are read.
    """
    rows = rollouts()
    written = [r for r in rows if r.tokens]
    with vllm() as server:
        late = Run(OWN, {"kind": "server", "urls": [server.url], "early": False})
        assert late.begun is None
        expected = late.step(rows)
        run = Run(OWN, server.url)
        server.requests.clear()
        run.begin(rows[::-1])
        assert about(server, written) == len(written) == len(server.requests)
        found = run.step(rows)
        assert about(server, written) == len(written) and len(server.requests) == len(written) + 1
        same(found, expected, 0.0)
        same(run.step(rows), expected, 0.0)  # what was read is kept no longer
        assert about(server, written) == 2 * len(written)
    said = run.early.metrics()
    # that of no tokens asks nothing
    assert (said["early/begun"], said["early/used"]) == (len(rows), len(written))
    assert run.early.metrics() == dict.fromkeys(said, 0.0)
    assert run.begun is not None and run.begun.size == 0
    assert len(run.early.spans(0)) == len(rows) and run.early.spans(0) == []


def test_what_another_model_names_is_asked_in_the_step() -> None:
    rows = rollouts()
    with vllm() as server:
        expected = Run(AT_STUDENTS, {"kind": "server", "urls": [server.url], "early": False}).step(
            rows
        )
        run = Run(AT_STUDENTS, server.url)
        asked = asked_of(Needs(frozenset(AT_STUDENTS)), run.scorers)["teacher"]
        assert set(asked) == set(OWN)
        run.begin(rows)
        same(run.step(rows), expected, 0.0)
        assert run.early.metrics()["early/used"] == 4


@pytest.mark.parametrize("facts", [OWN, AT_STUDENTS, WHOLE], ids=["numbers", "at ids", "states"])
def test_our_own_server_reads_each_rollout_by_itself(facts: tuple[Fact, ...]) -> None:
    """So that a run says the same to the bit whatever had ended when; equal to rounding to rollouts
    that are read together.
    """
    rows = rollouts()
    with serving(tiny_model("llama", seed=2)) as (one,):
        said = {"kind": "server", "urls": [url(one)]}
        together = Run(facts, said)
        assert together.begun is None
        run = Run(facts, {**said, "early": True})
        late = run.step(rows)
        same(late, together.step(rows), FORWARD)
        for some in (rows, rows[:2], rows[3:]):
            run.begin(some)
            same(run.step(rows), late, 0.0)
        assert run.early.metrics()["early/used"] == 4 + 2 + 1


def test_an_error_goes_to_the_process_that_learns_from_the_rollout() -> None:
    rows = rollouts(lengths=((3, 5), (7, 4)))
    with vllm() as server:
        runs = [Run(OWN, {"kind": "server", "urls": [server.url], "retries": 0}) for _ in "ab"]
        good = server.logps
        server.logps = lambda ids: torch.full((len(ids), 320), torch.nan)  # type: ignore[method-assign]
        runs[0].begin(rows)
        server.logps = good  # type: ignore[method-assign]

        def learns(mesh: Mesh) -> str:
            run = runs[mesh.rank]
            run.early.mesh = mesh
            run.early.settle(0, rows)
            [mine] = [r for r, rank in zip(rows, mesh.owners(rows)) if rank == mesh.rank]
            with pytest.raises(UserError, match=rf"{mine.id} at teacher .* are no log-probs"):
                run.step([mine])
            return mine.id

        assert sorted(on_each(2, learns)) == [r.id for r in rows]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, tokens=[*r.tokens[:-1], 7]),
        lambda r: replace(r, prompt=[*r.prompt, 7]),
        # what a teacher wrote is not asked about
        lambda r: replace(r, marks={"guided": [True] + [False] * (len(r.tokens) - 1)}),
    ],
    ids=["tokens", "prompt", "positions"],
)
def test_a_rollout_that_was_changed_is_asked_again(change: Callable[[Rollout], Rollout]) -> None:
    rows = rollouts(lengths=((3, 5), (7, 4)))
    changed = [change(rows[0]), rows[1]]
    with vllm() as server:
        run = Run(OWN, server.url)
        run.begin(rows)
        found = run.step(changed)
        plain = {"kind": "server", "urls": [server.url], "early": False}
        same(found, Run(OWN, plain).step(changed), 0.0)
    assert run.early.metrics()["early/used"] == 1
    run.early.settle(1, rows)
    assert run.early.metrics()["early/discarded"] == 1
    assert run.begun is not None and run.begun.size == 0


def test_answers_wait_for_the_step_that_they_are_for() -> None:
    rows = rollouts()
    with vllm() as server:
        run = Run(OWN, server.url)
        run.begin(rows, step=3)
        run.early.settle(3, rows)
        assert run.early.metrics()["early/discarded"] == 0
        run.early.settle(4, rows)
        assert run.early.metrics()["early/discarded"] == 4


@pytest.mark.parametrize("facts", [OWN, WHOLE], ids=["numbers", "states"])
@pytest.mark.parametrize("by", ["the first", "all in turn"])
def test_answers_go_to_the_process_that_learns_from_the_rollout(
    facts: tuple[Fact, ...], by: str
) -> None:
    """Whoever began them, and nothing is asked twice."""
    rows = rollouts(lengths=((3, 5), (7, 4), (2, 9), (4, 6)))
    with serving(tiny_model("llama", seed=2)) as (one,):
        runs = [Run(facts, {"kind": "server", "urls": [url(one)], "early": True}) for _ in "ab"]
        expected = runs[0].step(rows)

        def learns(mesh: Mesh) -> Any:
            run = runs[mesh.rank]
            run.early.mesh = mesh
            mine = (rows if mesh.rank == 0 else []) if by == "the first" else rows[mesh.rank :: 2]
            run.begin(mine)
            run.early.settle(0, rows)
            batch = gather(rows, Needs(frozenset(facts)), run.scorers, mesh=mesh)
            found = {fact: batch.read(fact) for fact in facts}
            return found, batch.mine, run.early.metrics()

        found = on_each(2, learns)
    assert found[0][2] == found[1][2] and found[0][2]["early/used"] == len(rows)
    for fact in facts:
        parts = [
            torch.where(mine if not fact.shape else mine[..., None], of[fact], 0)
            for of, mine, _ in found
        ]
        torch.testing.assert_close(sum(parts), expected[fact], rtol=0, atol=0)
    assert all(run.begun is not None and run.begun.size == 0 for run in runs)


def test_routes_and_views_of_the_row_are_begun_and_late_views_are_not() -> None:
    rows = [
        replace(
            r,
            row={"teacher": "ab"[i % 2], "id": i, "prompt": "What?", "solution": f"So {i}."},
            feedback="wrong",
        )
        for i, r in enumerate(rollouts())
    ]
    with vllm() as server, serving(tiny_model("qwen3", seed=4)) as (own,):

        def run(view: str | None, begins: bool) -> Run:
            one: dict[str, Any] = {"kind": "server", "urls": [server.url], "early": begins}
            two = {"kind": "server", "urls": [url(own)], "early": begins}
            return Run(OWN, {"a": one, "b": two} | ({"view": view} if view else {}))

        for view, used in ((None, 4), ("solution", 4), ("feedback", 0)):
            first = run(view, True)
            assert all(early(first.teacher, r) == (used > 0) for r in rows)
            first.begin(rows)
            found = first.step(rows)
            assert first.early.metrics()["early/used"] == used
            same(found, run(view, False).step(rows), FORWARD)


def test_nothing_is_begun_where_another_route_computes_in_this_process(tmp_path: Path) -> None:
    """It would, while the student writes with the same device."""
    local = str(save_tiny(tmp_path / "local", kind="qwen3", seed=4))
    rows = [replace(r, row={"teacher": "ab"[i % 2], "id": i}) for i, r in enumerate(rollouts())]
    with vllm() as server:
        run = Run(OWN, {"a": server.url, "b": local})
        assert not any(early(run.teacher, row) for row in rows)
        run.begin(rows)
        assert run.early.metrics()["early/begun"] == 0


def test_an_error_of_what_was_begun_is_that_of_the_step_that_reads_it() -> None:
    """Though the server is well again by then: a number that is none is never asked for twice. Of a
    rollout that was dropped it is nobody's.
    """
    rows = rollouts(lengths=((3, 5), (7, 4)))
    with vllm() as server:
        run = Run(OWN, {"kind": "server", "urls": [server.url], "retries": 0})
        expected = run.step(rows[1:])
        good = server.logps
        broken = rows[0].prompt + rows[0].tokens
        nan = torch.full((8, 320), torch.nan)
        server.logps = lambda ids: nan if list(ids) == broken else good(ids)  # type: ignore[method-assign]
        run.begin(rows)
        server.logps = good  # type: ignore[method-assign]
        same(run.step(rows[1:]), expected, 0.0)
        with pytest.raises(UserError, match=r"rollout 0/0/0 at teacher .* are no log-probs"):
            run.step(rows)
    assert run.early.metrics()["early/failed"] == 1
