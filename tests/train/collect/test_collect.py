"""A prompt that a step takes more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from opdkit.base.clock import Clock
from opdkit.base.errors import UserError
from opdkit.curricula import Ask, Curriculum, Frontier, Memory, Plain, Recalled, Writer
from opdkit.curricula.cached import CacheWriter
from opdkit.curricula.data import DataWriter
from opdkit.curricula.prefix import GuidedWriter
from opdkit.curricula.student import StudentWriter
from opdkit.data import PromptStream
from opdkit.sampling import HFSampler
from opdkit.train.collect.collect import Collected, collect, prepare
from opdkit.train.collect.collector import Collector
from opdkit.train.collect.filters import DynamicSampling, Filter
from opdkit.train.settings import Optim
from opdkit.train.student import Student
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.tiny import tiny_model, tiny_tokenizer

GENERATIONS = 2
STUDENT = StudentWriter()


class Asked(list[Prompt]):
    """Prompts with the same reference response to each."""

    def response_tokens(self, index: int) -> list[int]:
        return [5, 6, 7, 8]

    def turns(self, index: int) -> list[Prompt]:
        """Two of each."""
        whole = self[index]
        return [
            replace(whole, id=f"{whole.id}:turn{n}", tokens=whole.tokens[:n], group="")
            for n in (1, 2)
        ]


@dataclass(frozen=True)
class Written(Plain):
    """A curriculum that lets somebody write."""

    by: Writer

    @property
    def writer(self) -> Writer:
        return self.by


class Stored:
    def rollouts(self, prompt: Prompt) -> list[Rollout]:
        return [Rollout(f"{prompt.id}/0", prompt.tokens, [5], [True], [-1.0], [-1.0], prompt.id)]


@pytest.fixture(scope="module")
def student() -> Student:
    return Student(tiny_model(), Optim(), 1e-3, 1)


def step_of(
    student: Student,
    size: int,
    per_step: int,
    writer: Writer = STUDENT,
    skipped: int = 0,
    filters: Sequence[Filter] = (),
    reward: Any = None,
    curriculum: Curriculum | None = None,
    memory: Memory | None = None,
) -> list[Rollout]:
    """The rollouts of a step that takes `per_step` prompts of `size`, `skipped` into an epoch."""
    collector = collector_of(student, size, per_step, writer, skipped, filters, reward, curriculum)
    before = collector.stream.state()
    clock = Clock(torch.device("cpu"))
    made = collect(collector, student.updates, clock, step=3, total_steps=9, memory=memory or {})
    assert curriculum is None or collector.stream.state() == before  # what is chosen is not taken
    assert {r.id for r in made.rollouts} <= {r.id for r in made.scored}
    return made.rollouts


def collected(student: Student, size: int, per_step: int, **settings: Any) -> Collected:
    """A step with all that is known of it."""
    collector = collector_of(student, size, per_step, **settings)
    clock = Clock(torch.device("cpu"))
    return collect(collector, student.updates, clock, step=3, total_steps=9, memory={})


def collector_of(
    student: Student,
    size: int,
    per_step: int,
    writer: Writer = STUDENT,
    skipped: int = 0,
    filters: Sequence[Filter] = (),
    reward: Any = None,
    curriculum: Curriculum | None = None,
) -> Collector:
    stream = PromptStream(size)
    stream.take(skipped)
    return Collector(
        curriculum=curriculum or Written(writer),
        sampler=HFSampler(student.model, tiny_tokenizer()),
        prompts=Asked(Prompt(f"p{i}", [5 + i, 6]) for i in range(size)),
        stream=stream,
        sampling=Sampling(max_completion_length=6, num_generations=GENERATIONS),
        prompts_per_step=per_step,
        reward=reward,
        filters=tuple(filters),
        stored=Stored(),
    )


def test_every_drawing_has_responses_of_its_own(student: Student) -> None:
    """Five prompts of two: each twice, one a third time; ids go on counting, and the group stays.

    The first responses are those of a step that takes each once.
    """
    rollouts = step_of(student, 2, 5)
    by_prompt = {g: [r for r in rollouts if r.group == g] for g in ("p0", "p1")}
    assert sorted(map(len, by_prompt.values())) == [2 * GENERATIONS, 3 * GENERATIONS]
    for group, mine in by_prompt.items():
        assert [r.id for r in mine] == [f"3/{group}/{n}" for n in range(len(mine))]
        assert len({tuple(r.tokens) for r in mine}) == len(mine)
    once = {r.id: r.tokens for r in step_of(student, 2, 2)}
    assert once.items() <= {r.id: r.tokens for r in rollouts}.items()
    assert step_of(student, 2, 5) == rollouts  # as in a resumed run


def test_a_prompt_on_both_sides_of_an_epochs_end_is_asked_twice(student: Student) -> None:
    """Somewhere a step of two prompts takes the last of an epoch of three and the same as the first
    of the next.
    """
    twice = []
    for epoch in range(20):
        rollouts = step_of(student, 3, 2, skipped=3 * epoch + 2)
        assert len({r.id for r in rollouts}) == len(rollouts) == 2 * GENERATIONS
        twice += [rollouts] if len({r.group for r in rollouts}) == 1 else []
    assert twice and all(len({tuple(r.tokens) for r in mine}) == 4 for mine in twice)


def test_guided_rollouts_of_a_prompt_that_comes_twice(student: Student) -> None:
    rollouts = step_of(student, 1, 2, GuidedWriter(3))
    plain = [f"3/p0/{n}" for n in range(2 * GENERATIONS)]
    assert [r.id for r in rollouts] == plain + [f"3/p0:guided/{n}" for n in range(6)]


@pytest.mark.parametrize("writer", [DataWriter(), CacheWriter()])
def test_responses_that_are_there_already_come_once(student: Student, writer: Writer) -> None:
    assert len(step_of(student, 2, 5, writer)) == 2


def test_dynamic_sampling_that_draws_a_prompt_again_gets_other_responses(student: Student) -> None:
    """One prompt, whose first two responses are wrong and whose third is right: the next drawing
    makes it informative, which the same responses again never would.
    """

    def third(rollout: Rollout) -> float:
        return float(rollout.id == "3/p0/2")

    rollouts = step_of(student, 1, 1, filters=[DynamicSampling(1)], reward=third)
    assert [(r.id, r.correct) for r in rollouts] == [("3/p0/2", True), ("3/p0/3", False)]


# ------------------------------------------------------------------------- prompts that are chosen


@dataclass(frozen=True)
class Choice(Plain):
    """Always the same answer."""

    of: tuple[int, ...]

    def choose(self, *asked: Any) -> list[int]:
        return list(self.of)

    def longest(self, memory: Memory) -> int:
        return memory.get("longest", 99)


def test_a_step_asks_what_the_frontier_chooses_and_none_twice(student: Student) -> None:
    memory = {"smoothed_pass_rate": {f"p{i}": 0.99 for i in range(6) if i != 2}}
    rollouts = step_of(student, 6, 3, curriculum=Frontier(sigma=0.01), memory=memory)
    asked = list(dict.fromkeys(r.question for r in rollouts))
    assert asked[0] == "p2" and len(asked) == 3 and len(rollouts) == 3 * GENERATIONS
    assert rollouts == step_of(student, 6, 3, curriculum=Frontier(sigma=0.01), memory=memory)


def test_more_prompts_than_there_are_begin_anew_with_other_responses(student: Student) -> None:
    """Three prompts, and steps of five: each once, then two of them again."""
    rollouts = step_of(student, 3, 5, curriculum=Frontier())
    times = Counter(r.question for r in rollouts)
    assert sorted(times.values()) == [GENERATIONS, 2 * GENERATIONS, 2 * GENERATIONS]
    assert len({r.id for r in rollouts}) == 5 * GENERATIONS


def test_filters_that_ask_for_more_get_prompts_that_were_not_asked_yet(student: Student) -> None:
    """Of six prompts three are informative; steps of two go on until they have two of these. What
    filters drop is seen by the curriculum all the same.
    """
    asked: list[str] = []

    def odd(rollout: Rollout) -> float:
        asked.append(rollout.question)
        return float(rollout.question in ("p1", "p3", "p5") and rollout.id.endswith("0"))

    rollouts = step_of(
        student, 6, 2, curriculum=Frontier(), filters=[DynamicSampling(2)], reward=odd
    )
    assert len({r.question for r in rollouts}) == 2
    assert {r.question for r in rollouts} <= {"p1", "p3", "p5"}
    assert max(Counter(asked).values()) == GENERATIONS


@pytest.mark.parametrize("wrong", [(), (0, 0), (3,), (-1,)])
def test_a_choice_that_is_none_is_explained(student: Student, wrong: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="must return different indices of what it is given"):
        step_of(student, 3, 2, curriculum=Choice(wrong))


def test_a_curriculum_cuts_what_is_written_now_and_never_beyond_the_run(student: Student) -> None:
    def lengths(memory: Memory) -> int:
        rollouts = step_of(student, 3, 3, curriculum=Choice((0, 1, 2)), memory=memory)
        assert all(r.finish == "length" or r.tokens[-1] == 2 for r in rollouts)
        return max(len(r.tokens) for r in rollouts)

    assert (lengths({"longest": 2}), lengths({"longest": 5}), lengths({})) == (2, 5, 6)
    data = step_of(student, 2, 2, DataWriter())
    assert {len(r.tokens) for r in data} == {4}


# ------------------------------------------------------------- rollouts that were written earlier


def earlier(name: str, question: str, **fields: Any) -> Rollout:
    return Rollout(
        name, [5], [6, 7], [True] * 2, [-1.0] * 2, [-1.0] * 2, name, question=question, **fields
    )


@dataclass(frozen=True)
class Again(Plain):
    """A group in the place of a prompt and one beside them; of all prompts some are asked."""

    def asked(self, questions: Sequence[str], memory: Memory) -> list[int]:
        return [1, 4, 5]

    def recalled(self, count: int, step: int, seed: int, memory: Memory) -> Recalled:
        right = earlier("a", "p0", reward=1.0, correct=True)
        wrong = replace(right, id="b", reward=0.0, correct=False)
        return Recalled([right, wrong], [earlier("c", "p2", reward=1.0, correct=True)])


def test_some_take_the_place_of_a_prompt_and_some_stand_beside_them(student: Student) -> None:
    for skipped in range(6):
        made = collected(student, 6, 3, curriculum=Again(), skipped=skipped)
        written = [r for r in made.rollouts if r.id not in ("a", "b", "c")]
        assert len(written) == 2 * GENERATIONS
        assert {r.question for r in written} <= {"p1", "p4", "p5"}
        assert [r.id for r in made.rollouts[len(written) :]] == ["a", "b", "c"]
        assert made.earlier == {"a", "b", "c"} and made.scored == written
        assert made.tokens == sum(len(r.tokens) for r in written)


def test_filters_see_what_takes_the_place_of_a_prompt_and_not_what_is_beside(
    student: Student,
) -> None:
    """Dynamic sampling keeps the mixed group as one of its prompts, draws until there are two more,
    and does not drop the right answer that stands alone; rewards are not given anew.
    """

    def rewarded(rollout: Rollout) -> float:
        assert rollout.id not in ("a", "b", "c")
        return float(rollout.id.endswith("0") and rollout.question != "p1")

    made = collected(
        student, 6, 3, curriculum=Again(), filters=[DynamicSampling(3)], reward=rewarded
    )
    assert [r.id for r in made.rollouts if r.id in "abc"] == ["a", "b", "c"]
    assert {r.question for r in made.rollouts} == {"p0", "p2", "p4", "p5"}


def test_before_the_first_step_prompts_are_asked_by_number_and_rewarded(student: Student) -> None:
    """Responses are numbered on, so that those of a later question are others."""

    @dataclass(frozen=True)
    class Asks(Plain):
        def prepared(self, ask: Ask, memory: Memory) -> Memory:
            ticks: list[int] = []
            first = ask.sample([2, 0], 2, 0, ticks.append)
            more = ask.sample([2], 1, 2, ticks.append)
            assert ticks and list(ask.questions) == ["p0", "p1", "p2"]
            return {**memory, "told": [(r.id, r.reward) for r in (*first, *more)]}

    collector = collector_of(student, 3, 2, curriculum=Asks(), reward=lambda r: float(r.id[-1]))
    told = [("p2/0", 0.0), ("p2/1", 1.0), ("p0/0", 0.0), ("p0/1", 1.0), ("p2/2", 2.0)]
    assert prepare(collector, student, {"x": 1}) == {"x": 1, "told": told}
