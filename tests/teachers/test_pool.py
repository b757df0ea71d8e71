"""The pool of teacher workers: who swaps for whom, by hand-worked cases of the schedule, and
threads in which nothing is lost.
"""

from __future__ import annotations

import threading
from concurrent.futures import wait
from typing import Any

import pytest

from opdkit import UserError
from opdkit.teachers.pool import Gone, Job, Place, Pool, Schedule, Tally, Worker


def schedule(*holds: str | None, patience: float = 30.0) -> Schedule:
    return Schedule([Place(i, teacher) for i, teacher in enumerate(holds)], patience)


def ask(of: Schedule, teacher: str, tokens: int = 100, since: float = 0.0) -> None:
    of.add(Job(teacher, None, tokens, since))


def begun(of: Schedule, now: float = 0.0) -> dict[int, str | None]:
    return {place.number: place.holds for place in of.assign(now)}


# ---------------------------------------------------------------------------------------- schedule


def test_a_worker_goes_on_with_its_teacher_and_swaps_only_when_that_has_no_work() -> None:
    one = schedule("math")
    ask(one, "code", tokens=10_000)
    ask(one, "math", tokens=1)
    assert begun(one) == {0: "math"}
    one.places[0].job = None
    assert begun(one) == {0: "code"}


def test_most_waiting_tokens_that_nobody_holds_come_first() -> None:
    three = schedule(None, "chat", None)
    for teacher, tokens in (("math", 50), ("code", 80), ("math", 40), ("chat", 1000)):
        ask(three, teacher, tokens)
    # chat stays where it is; code has 80, math 50 + 40 tokens
    assert begun(three) == {1: "chat", 0: "math", 2: "code"}


def test_who_swaps_holds_nothing_or_what_was_used_longest_ago() -> None:
    three = schedule("a", "b", "c")
    for place, used in zip(three.places, (9.0, 3.0, 5.0)):
        place.used = used
    ask(three, "d")
    assert begun(three, 10.0) == {1: "d"}


@pytest.mark.parametrize(
    ("tokens", "copied"),
    [(1999, False), (2001, True)],
)
def test_a_second_copy_where_the_queue_is_longer_than_two_swaps(tokens: int, copied: bool) -> None:
    """A swap takes 10 s, and a worker reads 100 tokens a second: 2,000 take two swaps."""
    two = schedule("math", None)
    two.tallies["math"] = Tally(requests=1, tokens=500, busy=5.0, swaps=2, swapping=20.0)
    two.places[0].job = Job("math", None, 1, 0.0)
    ask(two, "math", tokens)
    assert begun(two) == ({1: "math"} if copied else {})


def test_what_nobody_has_measured_is_not_copied_until_it_is_late() -> None:
    two = schedule("math", None)
    two.places[0].job = Job("math", None, 1, 0.0)
    ask(two, "math", tokens=10**9)
    assert begun(two, 30.0) == {}
    assert begun(two, 31.0) == {1: "math"}


def test_none_of_five_teachers_starves_and_a_turn_is_worth_its_swap() -> None:
    """One worker, five teachers that always have work, 1 s a request, 10 s a swap: a turn is
    max(30, 4 x 10) s. Each waits at most for five turns and swaps, and at most a quarter of the
    time is swapped.
    """
    one, now, names = schedule(None), 0.0, "abcde"
    served, last, longest = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0), 0.0
    for name in names:
        ask(one, name)
    swapping = 0.0
    while now < 2000.0:
        held = one.places[0].holds
        [place] = one.assign(now)
        assert place.job is not None
        name = place.job.teacher
        tally = one.tally(name)
        if name != held:
            now, tally.swaps, tally.swapping = now + 10.0, tally.swaps + 1, tally.swapping + 10.0
            swapping += 10.0
        longest = max(longest, now - last[name])
        now += 1.0
        tally.busy, tally.tokens = tally.busy + 1.0, tally.tokens + 100
        served[name] += 1
        last[name], place.job = now, None
        ask(one, name, since=now)  # more of the same, always
    assert min(served.values()) > 0.7 * max(served.values())
    assert longest <= 5 * (40.0 + 1.0)
    assert swapping / now <= 0.25


# ------------------------------------------------------------------------------------------ threads


class Fake(Worker):
    """Answers with its teacher's name and the request; notes what it holds."""

    def __init__(self, deaths: list[str] | None = None):
        self.held: str | None = None
        self.loads: list[str] = []
        self.deaths = deaths if deaths is not None else []  # requests at which a worker ends
        self.closed = False

    def load(self, name: str) -> None:
        if name == "missing":
            raise UserError("there is no model called missing")
        self.held = name
        self.loads.append(name)

    def call(self, name: str, request: Any) -> Any:
        assert self.held == name
        if request in self.deaths:
            self.deaths.remove(request)
            raise Gone(f"ended at {request}")
        if request == "wrong":
            raise ValueError("wrong")
        return name, request

    def close(self) -> None:
        self.closed = True


def test_every_request_is_answered_by_its_own_teacher() -> None:
    workers = [Fake(), Fake()]
    pool = Pool(workers)
    asked = [(f"t{i % 5}", i) for i in range(100)]
    answers = [pool.submit(name, i, 7) for name, i in asked]
    assert [a.result(10) for a in answers] == asked
    counts, spans = pool.counts(), pool.spans()
    assert {n: v for n, v in counts.items() if "tokens/" in n} == {
        f"pool/tokens/t{i}": 140.0 for i in range(5)
    }
    assert counts["pool/swaps"] == sum(len(w.loads) for w in workers) <= 10
    assert sum(doing == "score" for _, doing, _, _ in spans) == 100
    assert all(a <= b for _, _, a, b in spans)
    middle = spans[49][3]
    assert pool.spans(middle) == [s for s in spans if s[3] > middle] and pool.spans(1e12) == []
    pool.close()
    assert all(w.closed for w in workers)


def test_a_dead_workers_request_goes_to_another_and_the_worker_is_replaced() -> None:
    deaths, made = ["x"], []

    def another(number: int) -> Worker:
        made.append(number)
        return Fake()

    pool = Pool([Fake(deaths)], replacement=another)
    assert [pool.submit("a", r, 1).result(10) for r in ("w", "x", "y")] == [
        ("a", "w"),
        ("a", "x"),
        ("a", "y"),
    ]
    assert made == [0] and pool.counts()["pool/replaced"] == 1
    pool.close()


def test_a_request_that_ends_every_worker_is_given_up_and_others_go_on() -> None:
    deaths = ["bomb"] * 3
    pool = Pool([Fake(deaths)], replacement=lambda number: Fake(deaths))
    bomb, good = pool.submit("a", "bomb", 1), pool.submit("b", "fine", 1)
    with pytest.raises(UserError, match=r"teacher a gave no answer: 3 worker.*out of memory"):
        bomb.result(10)
    assert good.result(10) == ("b", "fine")
    pool.close()


def test_without_workers_everything_that_waits_says_so() -> None:
    hold = threading.Event()

    class Slow(Fake):
        def call(self, name: str, request: Any) -> Any:
            hold.wait(10)
            raise Gone("the machine is away")

    pool = Pool([Slow()])
    waiting = [pool.submit(name, 0, 1) for name in ("a", "a", "b")]
    hold.set()
    wait(waiting, 10)
    for answer in waiting:
        with pytest.raises(UserError, match="the machine is away"):
            answer.result(0)
    pool.threads[0].join(10)
    with pytest.raises(UserError, match="no worker"):
        pool.submit("a", 0, 1)
    pool.close()


def test_an_error_of_a_request_or_of_a_teacher_is_its_own() -> None:
    pool = Pool([Fake()])
    missing = [pool.submit("missing", i, 1) for i in range(3)]
    wrong, right = pool.submit("a", "wrong", 1), pool.submit("a", "right", 1)
    for answer in missing:
        with pytest.raises(UserError, match="no model called missing"):
            answer.result(10)
    with pytest.raises(ValueError, match="wrong"):
        wrong.result(10)
    assert right.result(10) == ("a", "right")
    pool.close()


def test_what_is_called_off_before_it_begins_is_not_asked() -> None:
    hold, seen = threading.Event(), []

    class Slow(Fake):
        def call(self, name: str, request: Any) -> Any:
            hold.wait(10)
            seen.append(request)
            return request

    pool = Pool([Slow()])
    first, second, third = (pool.submit("a", i, 1) for i in range(3))
    assert second.cancel()
    hold.set()
    assert (first.result(10), third.result(10), seen) == (0, 2, [0, 2])
    pool.close()
