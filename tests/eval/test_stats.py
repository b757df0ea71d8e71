"""Avg@k, Pass@k and their intervals against numbers worked by hand and by enumeration."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from opdkit.eval.intervals import difference_interval, exact, share_interval
from opdkit.eval.stats import avg_at_k, paired_difference, pass_at_k


def test_avg_at_k_counts_every_problem_the_same():
    # Means 1/2 and 1; pooled samples would give 5/6.
    assert avg_at_k([[True, False], [1, 1, 1, 1]]) == 0.75


def test_avg_at_k_refuses_nothing():
    for nothing in ([], [[True], []]):
        with pytest.raises(ValueError, match="at least one"):
            avg_at_k(nothing)


def test_pass_at_k_is_unbiased_where_the_bootstrap_is_not():
    # R9: C(3,2)/C(4,2) = 3/6; drawing with replacement would give 1 - (3/4)**2 = 0.4375.
    assert pass_at_k(4, 1, 2) == 0.5


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            share = np.mean([any(subset) for subset in combinations(samples, k)])
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_large_counts_is_exact():
    # k = 1 is the plain share, also where C(n, k) has hundreds of digits at other k.
    assert pass_at_k(2000, 500, 1) == 0.25
    assert pass_at_k(2000, 1, 1000) == 0.5


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be_estimated(n, c, k):
    with pytest.raises(ValueError, match=r"samples"):
        pass_at_k(n, c, k)


def binomial(n: int, x: int, p: float) -> float:
    return comb(n, x) * p**x * (1 - p) ** (n - x)


@pytest.mark.parametrize("n", [1, 5, 30, 64])
def test_intervals_cover_the_true_share_by_enumeration(n: int) -> None:
    """Every outcome of n problems with its probability: the true share is inside 95% of the time.

    AIME has 30 problems and weak students solve one in twenty.
    """
    every = [share_interval([1.0] * x + [0.0] * (n - x)) for x in range(n + 1)]
    for p in (0.005, 0.02, 0.05, 0.1, 0.3, 0.5, 0.77, 0.95, 0.99):
        covered = sum(binomial(n, x, p) for x in range(n + 1) if every[x].low <= p <= every[x].high)
        assert covered >= 0.95 - 1e-12


def test_intervals_of_paired_differences_cover_by_enumeration() -> None:
    """30 problems: gained with probability a, lost with b, else the same."""
    n = 30
    cells = [(x, y) for x in range(n + 1) for y in range(n + 1 - x)]
    found = {
        (x, y): difference_interval([1.0] * x + [-1.0] * y + [0.0] * (n - x - y)) for x, y in cells
    }
    for a, b in ((0.05, 0.05), (0.05, 0.0), (0.1, 0.05), (0.2, 0.1), (0.3, 0.3)):
        covered = sum(
            comb(n, x) * comb(n - x, y) * a**x * b**y * (1 - a - b) ** (n - x - y)
            for (x, y), i in found.items()
            if i.low <= a - b <= i.high
        )
        assert covered >= 0.95


def test_intervals_at_the_ends_by_hand() -> None:
    """All of 64 right: the lower end solves p^64 = 2.5%. None of 30: 1 - (1 - p)^30 = 97.5%."""
    right, wrong = share_interval([1.0] * 64), share_interval([0.0] * 30)
    assert (right.low, right.high) == (pytest.approx(0.025 ** (1 / 64), abs=1e-12), 1.0)
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 30), abs=1e-12))
    same = difference_interval([0.0] * 30)
    assert same.high == -same.low == pytest.approx(wrong.high, abs=1e-12)


def test_a_large_sample_has_the_normal_interval() -> None:
    half = 1.96 * 0.5 / np.sqrt(400)
    interval = share_interval([0.0, 1.0] * 200)
    # the exact one is wider by about half a problem at each end
    assert interval.low == pytest.approx(0.5 - half, abs=0.002)
    assert interval.high == pytest.approx(0.5 + half, abs=0.002)


def test_more_answers_to_a_problem_say_more_where_they_do() -> None:
    """Eight answers of equal problems are eight times as many; of problems that are always or never
    solved they are as good as one.
    """
    equal, apart = [0.5] * 10, [0.0, 1.0] * 5
    one = share_interval(apart)
    assert share_interval(apart, samples=8) == one
    assert share_interval(equal, samples=8) == exact(40, 80)
    assert share_interval(equal, samples=8).low > one.low
    assert share_interval(apart, level=0.5).low > one.low


def test_intervals_refuse_bad_input() -> None:
    for values in ([], [float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="one finite number per problem"):
            share_interval(values)
    with pytest.raises(ValueError, match="level"):
        share_interval([1.0], level=95)


def test_paired_difference_cancels_how_hard_problems_are():
    a = np.linspace(0, 0.75, 40)
    # Each problem gains a quarter: 10 of its 40 answers.
    change = paired_difference(a.tolist(), (a + 0.25).tolist(), samples=40)
    assert change.value == pytest.approx(0.25)
    own = share_interval(a.tolist(), samples=40)
    # what might have been lost, unseen, in 40 problems is what is left of doubt
    assert change.interval.high - change.interval.low < 0.8 * (own.high - own.low)
    assert 0.15 < change.interval.low < 0.25 < change.interval.high < 0.28


def test_paired_difference_is_second_minus_first_over_the_same_problems():
    assert paired_difference([1.0, 1.0], [0.0, 1.0]).value == -0.5
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([1.0], [1.0, 0.0])
