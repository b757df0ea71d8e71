"""Samplers that share a step's prompts: with writers that are threads here, and that die, hang and
come late as they are told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from opdkit.base.errors import UserError
from opdkit.run.cluster.actors import Lost
from opdkit.run.cluster.crew import Crew, Sent
from opdkit.run.cluster.sampler import cut
from opdkit.teachers.pool import Gone
from opdkit.types import Prompt, Rollout


class Fake:
    """A sampler that writes one rollout for each prompt; `on` is asked before each method."""

    def __init__(self, on: Callable[[Fake, str], None] = lambda fake, method: None):
        self.on, self.weights, self.log = on, None, list[str]()

    def __call__(self, method: str, *arguments: Any) -> Any:
        self.log.append(method)
        self.on(self, method)
        return getattr(self, method)(*arguments)

    def alive(self) -> None:
        pass

    def load(self, weights: str, what: Any) -> float:
        self.weights = weights
        return 0.0

    def sample(self, weights: str, prompts: list[Prompt], asked: Any) -> list[Rollout] | None:
        if weights != self.weights:
            return None
        return [Rollout(p.id, [1], [2], [True], [0.0], [0.0], p.id, text=weights) for p in prompts]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", [1]) for i in range(count)]


def sent(name: str = "w", check: Callable[[str, Any], None] = lambda who, logp: None) -> Sent:
    return Sent(name, None, check)


def ids(written: list[list[Rollout]]) -> list[str]:
    return [rollout.id for part in written for rollout in part]


def written_by(fakes: dict[str, Fake], patience: float = 5.0) -> tuple[Crew, list[str]]:
    crew = Crew(lambda: fakes, patience)
    crew.send(sent())
    return crew, ids(crew.write(cut(prompts(7), 4), None))


ALL = [f"p{i}" for i in range(7)]


def test_prompts_are_cut_the_same_each_time() -> None:
    """Seven in three parts of neighbours, none empty, none left out; fewer prompts than parts."""
    assert [[p.id for p in part] for part in cut(prompts(7), 3)] == [
        ["p0", "p1"],
        ["p2", "p3"],
        ["p4", "p5", "p6"],
    ]
    assert [len(part) for part in cut(prompts(2), 8)] == [1, 1]


def test_rollouts_come_in_the_order_of_the_prompts_whoever_writes() -> None:
    crew, found = written_by({"a": Fake(), "b": Fake()})
    assert found == ALL
    assert sum(n for k, n in crew.counts().items() if k.startswith("sampler/rollouts/")) == 7
    assert {(part, what) for part, what, *_ in crew.spans()} >= {("sampler:a", "load")}
    assert crew.spans() == []  # each once


def dies(times: int, *, after: int = 0) -> Callable[[Fake, str], None]:
    """It is gone at its `after`-th part and for some calls after that, and has lost its weights."""

    def on(fake: Fake, method: str) -> None:
        if fake.log.count("sample") > after and dies.left > 0:  # type: ignore[attr-defined]
            dies.left -= 1  # type: ignore[attr-defined]
            fake.weights = None
            raise Gone("it is started again")

    dies.left = times  # type: ignore[attr-defined]
    return on


def test_who_dies_at_a_part_is_loaded_again_and_nothing_is_lost() -> None:
    """The only one there is: the part waits for its return."""
    fake = Fake(dies(3, after=1))
    crew, found = written_by({"a": fake})
    assert found == ALL and crew.counts()["sampler/lost"] == 1
    again = fake.log[fake.log.index("sample") + 2 :]  # the second part's call failed
    assert again[:4] == ["alive", "alive", "alive", "load"]
    assert crew.counts()["sampler/rollouts/a"] == 7


def test_who_was_started_again_unseen_says_that_it_has_no_weights() -> None:
    def on(fake: Fake, method: str) -> None:
        if fake.log.count("sample") == 2 and fake.log.count("load") == 1:
            fake.weights = None  # no error: it came back between two calls

    fake = Fake(on)
    assert written_by({"a": fake})[1] == ALL
    assert fake.log.count("load") == 2 and fake.log.count("sample") == 5


def test_of_two_the_one_that_stays_does_the_work() -> None:
    def lost(fake: Fake, method: str) -> None:
        if method == "sample":
            raise Lost("for good")

    first = Fake(lost)

    def after(fake: Fake, method: str) -> None:
        while method == "sample" and "sample" not in first.log:
            time.sleep(0.01)

    crew, found = written_by({"a": first, "b": Fake(after)})
    assert found == ALL and crew.counts()["sampler/rollouts/b"] == 7
    assert "a" not in crew.alive


def test_a_part_that_hangs_is_written_by_another() -> None:
    hangs = threading.Event()

    def on(fake: Fake, method: str) -> None:
        if method == "sample":
            hangs.wait(20)

    began = time.monotonic()
    crew, found = written_by({"a": Fake(on), "b": Fake()})
    hangs.set()
    assert found == ALL and time.monotonic() - began < 10
    assert crew.counts()["sampler/rollouts/b"] == 7


def test_one_that_comes_late_joins_the_next_request() -> None:
    fakes = {"a": Fake()}
    crew, _ = written_by(fakes)
    fakes["b"] = Fake(lambda fake, method: time.sleep(0.0))
    fakes["a"].on = lambda fake, method: time.sleep(0.05)
    assert ids(crew.write(cut(prompts(7), 7), None)) == ALL
    assert fakes["b"].log[:3] == ["alive", "load", "sample"]


def test_rollouts_are_by_the_weights_that_were_sent_last() -> None:
    fakes = {"a": Fake(), "b": Fake()}
    crew, _ = written_by(fakes)
    for name in ("x", "y", "z"):
        crew.send(sent(name))
        made = crew.write(cut(prompts(5), 5), None)
        assert {rollout.text for part in made for rollout in part} == {name}


def test_other_weights_than_were_sent_end_the_run() -> None:
    def check(who: str, theirs: float) -> None:
        raise UserError(f"{who} has other weights")

    crew = Crew(lambda: {"a": Fake()}, 5.0)
    crew.send(sent("w", check))
    with pytest.raises(UserError, match="a has other weights"):
        crew.write(cut(prompts(2), 2), None)


def test_an_error_of_the_request_is_the_runs() -> None:
    def on(fake: Fake, method: str) -> None:
        if method == "sample":
            raise UserError("the prompt is too long")

    crew = Crew(lambda: {"a": Fake(on)}, 5.0)
    crew.send(sent())
    with pytest.raises(UserError, match="too long"):
        crew.write(cut(prompts(2), 2), None)


@pytest.mark.parametrize("there", [{}, {"a": Fake(dies(10**6))}])
def test_without_a_sampler_it_does_not_wait_for_ever(there: dict[str, Fake]) -> None:
    dies.left = 10**6  # type: ignore[attr-defined]
    crew = Crew(lambda: there, 0.3)
    crew.send(sent())
    with pytest.raises(UserError, match="none of the samplers"):
        crew.write(cut(prompts(2), 2), None)
    dies.left = 0  # type: ignore[attr-defined]


def test_why_the_last_sampler_is_lost_is_said() -> None:
    def lost(fake: Fake, method: str) -> None:
        raise Lost("its device has no memory left")

    crew = Crew(lambda: {"a": Fake(lost)}, 0.3)
    crew.send(sent())
    with pytest.raises(UserError, match="a: its device has no memory left"):
        crew.write(cut(prompts(2), 2), None)


def test_each_part_is_heard_of_once_and_before_the_last_is_there() -> None:
    first = threading.Event()
    heard = list[str]()

    def on(fake: Fake, method: str) -> None:
        if fake.log.count("sample") == 3:
            assert first.wait(10), "nobody has heard of the parts before"

    def hear(made: list[Rollout]) -> None:
        heard.extend(rollout.id for rollout in made)
        first.set()

    crew = Crew(lambda: {"a": Fake(on)}, 5.0)
    crew.send(sent())
    crew.write(cut(prompts(3), 3), None, hear)
    assert sorted(heard) == ["p0", "p1", "p2"]
