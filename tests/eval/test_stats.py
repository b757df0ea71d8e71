"""Avg@k, Pass@k and their intervals against numbers worked by hand and by enumeration."""

from itertools import combinations

import numpy as np
import pytest

from opdkit.eval.stats import Interval, avg_at_k, bootstrap, paired_difference, pass_at_k


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


def test_bootstrap_agrees_with_the_normal_interval():
    values = [0.0, 1.0] * 200
    interval = bootstrap(values)
    half = 1.96 * 0.5 / np.sqrt(400)
    # Monte Carlo error of a 2.5% quantile over 2000 resamples is about 0.06 standard errors =
    # 0.0015; the grid is 1/400.
    assert interval.low == pytest.approx(0.5 - half, abs=0.006)
    assert interval.high == pytest.approx(0.5 + half, abs=0.006)


def test_bootstrap_is_reproducible_and_its_level_widens_it():
    values = np.linspace(0, 1, 50).tolist()
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    narrow, wide = bootstrap(values, level=0.5), bootstrap(values, level=0.99)
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high


def test_equal_values_leave_no_doubt():
    assert bootstrap([0.25] * 9) == Interval(0.25, 0.25)


def test_bootstrap_refuses_bad_input():
    for values in ([], [float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="one finite number per problem"):
            bootstrap(values)
    with pytest.raises(ValueError, match="level"):
        bootstrap([1.0], level=95)


def test_paired_difference_cancels_how_hard_problems_are():
    a = np.linspace(0, 0.75, 40)
    # Each problem gains exactly a quarter: the difference is certain although both means are not.
    change = paired_difference(a.tolist(), (a + 0.25).tolist())
    assert (change.value, change.interval.low, change.interval.high) == pytest.approx(
        (0.25, 0.25, 0.25)
    )
    own = bootstrap(a.tolist())
    assert own.high - own.low > 0.1


def test_paired_difference_is_second_minus_first_over_the_same_problems():
    assert paired_difference([1.0, 1.0], [0.0, 1.0]).value == -0.5
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([1.0], [1.0, 0.0])
