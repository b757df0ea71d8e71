"""What the student could do at the start: found, stored and had again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from opdkit.base.errors import UserError
from opdkit.curricula import Ask, Frontier, Plain, Recalled, Rehearsal
from opdkit.curricula.recall import again, kept
from opdkit.curricula.together import Together, join
from opdkit.types import Rollout

QUESTIONS = [f"q{i}" for i in range(6)]
# right answers in order, by question: q0 and q1 are mastered, q2 fails its last, q5 is never solved
RIGHT = {
    "q0": [1] * 5,
    "q1": [1, 0, 1, 1, 1],
    "q2": [1, 1, 1, 1, 0],
    "q3": [1, 1, 0, 0, 1],
    "q4": [0, 1, 0, 0, 1],
    "q5": [0] * 5,
}
PLAN = Rehearsal(samples=4, enough=3)


def answer(question: str, number: int) -> Rollout:
    right = bool(RIGHT[question][number])
    return Rollout(
        f"{question}/{number}",
        [1, 2],
        [5, number],
        [True, True],
        [-0.1, -0.2 - number],
        [-0.1, -0.2 - number],
        question,
        reward=float(right),
        correct=right,
        row={"id": question},
    )


class Student:
    """Answers as it is said above, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, int]] = Counter()

    def __call__(self, which, each, first, tick) -> list[Rollout]:
        made = [answer(QUESTIONS[i], first + n) for i in which for n in range(each)]
        self.asked.update((r.group, first + int(r.id[-1]) - first) for r in made)
        tick(len(made))
        return made


def prepared(plan: Rehearsal = PLAN) -> dict:
    """Its memory, as a checkpoint gives it back."""
    return json.loads(json.dumps(plan.prepared(Ask(QUESTIONS, Student()), {})))


def test_mastered_prompts_are_rehearsed_and_no_longer_asked():
    student = Student()
    memory = PLAN.prepared(Ask(QUESTIONS, student), {"other": 1})
    assert set(student.asked.values()) == {1}  # no response twice
    assert {q for q, n in student.asked if n == 4} == {"q0", "q1", "q2"}  # one more of these
    assert memory["other"] == 1
    stored = [again(row) for row in memory["rehearsal"]["pool"]]
    # the fifth answer, not one of those that showed it was mastered
    assert [r.id for r in stored] == ["rehearsal/q0/4", "rehearsal/q1/4"]
    assert all(r.logp == [-0.1, -4.2] and r.correct and r.reward == 1.0 for r in stored)
    assert PLAN.asked(QUESTIONS, memory) == [2, 3, 4, 5]
    assert PLAN.asked(["q5", "new", "q0"], memory) == [0]
    # 4 answers of two tokens to each, and one more to three
    assert memory["rehearsal"]["tokens"] == 2 * (6 * 4 + 3)
    dropped = prepared(replace(PLAN, drop_unsolved=True))
    assert dropped["rehearsal"]["explore"] == ["q2", "q3", "q4"]


def test_a_resumed_run_asks_nothing():
    def never(*asked):
        raise AssertionError(asked)

    memory = prepared()
    assert PLAN.prepared(Ask(QUESTIONS, never), memory) is memory
    assert Plain().prepared(Ask(QUESTIONS, never), memory) is memory


def test_stored_answers_are_marked_and_compared_with_no_other():
    found = PLAN.recalled(4, 0, 0, prepared())
    assert found.instead == () and len(found.beside) == 2
    for r in found.beside:
        assert r.marks == {"rehearsal": [True, True]} and r.trained == [True, True]
        assert r.group == r.id and r.question in ("q0", "q1") and r.row == {"id": r.question}


def pool(size: int) -> dict:
    rows = [
        kept(replace(answer("q0", 0), id=f"r{i}", group=f"r{i}", question=f"q{i}"))
        for i in range(size)
    ]
    return {"rehearsal": {"pool": rows, "explore": QUESTIONS, "tokens": 0}}


def slices(plan: Rehearsal, memory: dict, steps: int, seed: int = 0) -> list[list[str]]:
    return [[r.id for r in plan.recalled(1, s, seed, memory).beside] for s in range(steps)]


def test_slices_go_round_the_pool_in_a_new_order_each_time():
    plan, memory = replace(PLAN, rehearsed=3), pool(9)
    found = slices(plan, memory, 9)
    rounds = [[r for one in found[i : i + 3] for r in one] for i in (0, 3, 6)]
    for one in rounds:
        assert sorted(one) == [f"r{i}" for i in range(9)]
    assert rounds[0] != rounds[1] != rounds[2]
    assert found == slices(plan, memory, 9)  # as in a resumed run
    assert found != slices(plan, memory, 9, seed=1)


def test_slices_are_as_long_as_may_be_and_alike():
    """Five in slices of at most four: of three and of two, and no answer twice in a round."""
    plan, memory = replace(PLAN, rehearsed=4), pool(5)
    found = slices(plan, memory, 10)
    assert [len(one) for one in found] == [3, 2] * 5
    assert all(len({*a, *b}) == 5 for a, b in zip(found[::2], found[1::2]))
    # two per prompt where nothing is said, and never more than there are
    usual = replace(plan, rehearsed=None)
    assert [len(usual.recalled(n, 0, 0, memory).beside) for n in (1, 2, 9)] == [2, 3, 5]


def test_no_mastered_prompt_is_one_clear_message():
    with pytest.raises(UserError, match=r"0 have 5 right responses of 5 .*best has 4.*Lower"):
        Rehearsal(samples=5, enough=5).prepared(
            Ask(
                ["q2", "q3"],
                lambda which, each, first, tick: [
                    answer(["q2", "q3"][i], n) for i in which for n in range(each)
                ],
            ),
            {},
        )

    # mastered, but the one more was wrong
    def only(which, each, first, tick):
        return [answer("q2", first + n) for _ in which for n in range(each)]

    with pytest.raises(UserError, match=r"1 have 4 right responses of 4 .* none of these a right"):
        Rehearsal(samples=4, enough=4).prepared(Ask(["q2"], only), {})


def test_nothing_left_to_learn_is_one_too():
    def all_right(which, each, first, tick):
        return [answer("q0", first + n) for _ in which for n in range(each)]

    with pytest.raises(UserError, match="no prompt is left to learn from"):
        PLAN.prepared(Ask(["q0"], all_right), {})


def test_a_rollout_is_kept_whole_and_short():
    plain = answer("q0", 1)
    assert again(json.loads(json.dumps(kept(plain)))) == plain
    assert not {"trained", "drawn_logp", "notes", "turns", "finish"} & set(kept(plain))
    other = replace(
        plain,
        trained=[True, False],
        drawn_logp=[-0.5, -0.25],
        marks={"tool": [False, True]},
        turns=[0, 1],
        finish="length",
        feedback="no",
        policy_version=7,
        reward=None,
        correct=None,
    )
    assert again(json.loads(json.dumps(kept(other)))) == other


def test_beside_another_curriculum():
    both = join(PLAN, Frontier(), ("a", "b"))
    assert isinstance(both, Together) and both.recalls and both.marks == {"rehearsal"}
    memory = both.prepared(Ask(QUESTIONS, Student()), {})
    assert both.asked(QUESTIONS, memory) == [2, 3, 4, 5]
    assert [r.id for r in both.recalled(4, 0, 0, memory).beside] == [
        r.id for r in PLAN.recalled(4, 0, 0, memory).beside
    ]
    assert both.passes(0, 9) is None


def test_what_two_curricula_recall_is_had_together():
    a, b = answer("q0", 0), answer("q1", 0)
    assert Recalled([a]) + Recalled([b], [a]) == Recalled([a, b], [a])
