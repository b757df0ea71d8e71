"""The mathematics: each divergence against its definition, supports, estimators, grouped sums, and
draws that are keyed.
"""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.objective.divergences import (
    JSD,
    KINDS,
    Alpha,
    Chi2,
    ForwardKL,
    ReverseKL,
    SkewForward,
    SkewReverse,
    divergence,
    kind_of,
)
from opdkit.objective.maths import (
    deviations,
    group_means,
    group_softmax,
    k1,
    k2,
    k3,
    keyed_uniform,
    masked_mean,
    masked_quantile,
    normalise,
    restrict,
    row_mean,
    straight,
    to_go,
)
from tests.methods.toy import P_S, P_T, close, numbers


def d(kind, p=P_S, q=P_T):
    return divergence(kind, numbers(*p).log(), numbers(*q).log())


def kl(a, b):
    return (a * (a / b).log()).sum()


def random_pair(seed, n=6):
    p, q = (
        torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .mul(2)
        .softmax(-1)
    )
    return p, q


# -------------------------------------------------------------------------------------- divergences


@pytest.mark.parametrize(
    ("kind", "value"),
    [("forward_kl", 0.193794), ("reverse_kl", 0.223805), ("jsd", 0.050875), ("tv", 0.3)],
)
def test_worked_values(kind, value):
    assert close(d(kind_of(kind)), value)


DEFINITIONS = {  # of p = student, q = teacher
    ReverseKL(): lambda p, q: kl(p, q),
    ForwardKL(): lambda p, q: kl(q, p),
    JSD(0.3): lambda p, q: 0.3 * kl(q, 0.3 * q + 0.7 * p) + 0.7 * kl(p, 0.3 * q + 0.7 * p),
    JSD(0.3, True): lambda p, q: (
        (0.3 * kl(q, 0.3 * q + 0.7 * p) + 0.7 * kl(p, 0.3 * q + 0.7 * p)) / 0.21
    ),
    SkewForward(0.1): lambda p, q: kl(q, 0.1 * q + 0.9 * p),
    SkewReverse(0.1): lambda p, q: kl(p, 0.9 * q + 0.1 * p),
    Alpha(0.3): lambda p, q: ((q**0.3 * p**0.7).sum() - 1) / (0.3 * -0.7),
    KINDS["hellinger2"]: lambda p, q: 1 - (p * q).sqrt().sum(),
    KINDS["tv"]: lambda p, q: 0.5 * (p - q).abs().sum(),
    Chi2(): lambda p, q: ((p - q) ** 2 / q).sum(),
}


@pytest.mark.parametrize("kind", DEFINITIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_those_of_the_definition(kind, seed):
    _, q = random_pair(seed)
    z = torch.randn(
        6,
        generator=torch.Generator().manual_seed(seed + 50),
        dtype=torch.float64,
        requires_grad=True,
    )
    ours, naive = divergence(kind, z.log_softmax(0), q.log()), DEFINITIONS[kind](z.softmax(0), q)
    a, b = (torch.autograd.grad(x, z)[0] for x in (ours, naive))
    assert close(ours.detach(), naive.item(), 12) and torch.allclose(a, b, rtol=0, atol=1e-12)


GENERATORS = {  # the survey's frame: D_f = sum_v p_s f(u), u = p_t / p_s
    "forward_kl": lambda u: u * u.log(),
    "reverse_kl": lambda u: -u.log(),
    "jsd": lambda u: 0.5 * (u * (2 * u / (u + 1)).log() + (2 / (u + 1)).log()),
    "tv": lambda u: 0.5 * (u - 1).abs(),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_f_divergences(kind):
    p, q = numbers(*P_S), numbers(*P_T)
    f = GENERATORS[kind]
    assert close(d(kind_of(kind)), (p * f(q / p)).sum().item(), 12)
    # c (u - 1) adds nothing
    assert close(d(kind_of(kind)), (p * (f(q / p) + 7 * (q / p - 1))).sum().item(), 12)
    dual = (p * (q / p) * f(p / q)).sum().item()  # f*(u) = u f(1/u): the roles swapped
    swapped = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}.get(kind, kind)
    assert close(d(kind_of(swapped)), dual, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_never_negative_and_zero_only_at_agreement(kind):
    for seed in range(20):
        p, q = random_pair(seed)
        assert divergence(KINDS[kind], p.log(), q.log()) > 1e-4
        assert abs(divergence(KINDS[kind], p.log(), p.log())) < 1e-12


def test_skewed_forms():
    for share, value in ((0.1, 0.001818), (0.9, 0.172951), (1.0, 0.223805), (0.0, 0.0)):
        assert close(d(SkewReverse(1 - share)), value)  # KL(p_s || share p_t + (1 - share) p_s)
    # DistiLLM's own 0.1
    assert close(d(SkewReverse()), 0.172951) and close(d(SkewForward()), 0.159263)
    assert d(SkewForward(0.0)) == d(ForwardKL()) and d(SkewReverse(0.0)) == d(ReverseKL())
    disjoint = (numbers(1, 0).log(), numbers(0, 1).log())
    for kind in (SkewForward(), SkewReverse()):
        assert close(divergence(kind, *disjoint), -math.log(0.1))


def test_alpha_lies_between_the_two_kls():
    assert close(d(Alpha(1 - 1e-7)), d(ForwardKL()).item(), 6) and close(
        d(Alpha(1e-7)), d(ReverseKL()).item(), 6
    )
    assert close(d(Alpha(0.5)), 4 * d(KINDS["hellinger2"]).item(), 12)


def test_cap_bounds_each_entry():
    p, q = numbers(0.7, 0.2, 0.1), numbers(0.1, 0.2, 0.7)
    entries = p * (p / q).log()
    assert close(
        divergence(ReverseKL(), p.log(), q.log(), cap=0.05),
        entries.clamp(max=0.05).sum().item(),
        12,
    )
    assert entries.max() > 0.05 > entries.min()


def test_a_nan_is_not_hidden():
    assert divergence(ReverseKL(), numbers(0.5, 0.5).log(), numbers(math.nan, 0.5).log()).isnan()


def test_kinds_by_name():
    assert (
        kind_of("jsd") == JSD()
        and kind_of(JSD(0.1)) == JSD(0.1)
        and str(ForwardKL()) == "forward_kl"
    )
    with pytest.raises(ValueError, match="did you mean 'forward_kl'"):
        kind_of("foward_kl")
    for bad in (lambda: JSD(-0.1), lambda: JSD(1.1), lambda: Alpha(0.0), lambda: Alpha(1.0)):
        with pytest.raises(ValueError):
            bad()


# ----------------------------------------------------------------------------------------- supports


def test_what_becomes_of_the_rest():
    ls, lt = numbers(0.4, 0.3).log(), numbers(0.1, 0.2).log()
    read = {
        rest: [x.exp() for x in restrict(ls, lt, rest)]
        for rest in ("raw", "renormalise", "target", "tail")
    }
    assert close(read["raw"][0], (0.4, 0.3)) and close(read["raw"][1], (0.1, 0.2))
    assert close(read["renormalise"][0], (4 / 7, 3 / 7)) and close(
        read["renormalise"][1], (1 / 3, 2 / 3)
    )
    assert close(read["target"][0], (0.4, 0.3)) and close(read["target"][1], (1 / 3, 2 / 3))
    assert close(read["tail"][0], (0.4, 0.3, 0.3)) and close(read["tail"][1], (0.1, 0.2, 0.7))
    with pytest.raises(ValueError, match="must be one of"):
        restrict(ls, lt, "drop")


def test_an_empty_support_is_zero():
    nothing = torch.full((2, 3), -math.inf, dtype=torch.float64)
    assert (normalise(nothing) == -math.inf).all()
    for rest in ("raw", "renormalise", "target"):
        for kind in KINDS.values():
            assert (divergence(kind, *restrict(nothing, nothing, rest)) == 0).all()


# --------------------------------------------------------------------------------------- estimators


def test_estimators():
    x = numbers(-0.916291, 0.510826, 0.405465).neg()
    p = numbers(*P_S)
    assert (
        close((p * k1(x)).sum(), 0.223805)
        and close((p * k2(x)).sum(), 0.265479)
        and close((p * k3(x)).sum(), 0.223805)
    )
    assert (k3(torch.linspace(-5, 5, 101)) >= 0).all()


def test_straight_has_one_value_and_another_gradient():
    x = torch.tensor(3.0, requires_grad=True)
    y = straight(x**3, x**2)
    assert y == 27 and torch.autograd.grad(y, x)[0] == 6


# --------------------------------------------------------------------------- sums over rows, groups


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 33])
@pytest.mark.parametrize("g", [0.0, 0.5, 0.95, 1.0])
def test_to_go(length, g):
    x = torch.randn(2, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    naive = torch.stack(
        [sum(g ** (k - t) * x[:, k] for k in range(t, length)) for t in range(length)], 1
    )
    assert torch.allclose(to_go(x, g), naive, rtol=0, atol=1e-12)


def test_to_go_of_the_cards():
    assert close(to_go(numbers(-0.2, 0.1, -0.4)[None], 1.0), [[-0.5, -0.3, -0.4]])
    assert close(to_go(numbers(-0.2, 0.1, -0.4)[None], 0.5), [[-0.25, -0.1, -0.4]])


def test_means_and_quantiles_of_what_is_selected():
    x = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 7.0], [math.nan] * 3])
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    assert row_mean(x, mask).tolist() == [[1.5], [4.0], [0.0]] and masked_mean(
        x, mask
    ).item() == pytest.approx(7 / 3)
    assert [masked_quantile(x, mask, at).item() for at in (0.0, 0.25, 0.5, 1.0)] == [
        1.0,
        1.5,
        2.0,
        4.0,
    ]
    none = torch.zeros_like(mask)
    assert masked_mean(x, none) == 0 and masked_quantile(x, none, 0.5) == 0
    ten = torch.arange(11.0)[None]
    assert masked_quantile(ten, ten >= 0, 0.3) == 3  # 0.3 * 10 is a little more than 3


def test_group_softmax():
    logits, group = numbers(0.0, 1.0, 2.0, 50.0, -900.0, 5.0), torch.tensor([7, 7, 7, 3, 3, 9])
    among = torch.tensor([True, True, False, True, True, False])
    share = group_softmax(logits, among, group)
    assert close(share[:2], 2 * numbers(0, 1).softmax(0), 12) and share[2:].tolist() == [0, 2, 0, 0]
    # a constant changes nothing, and nothing overflows
    assert close(group_softmax(logits + 1e4, among, group), share, 9)
    spoilt = torch.where(among, logits, math.inf)
    # what is not among them is not read
    assert close(group_softmax(spoilt, among, group), share, 12)


DTYPES = [torch.float32, torch.float64, torch.bfloat16]
UNEVEN = torch.tensor([5] * 16 + [2] * 32 + [9] + [4] * 3)  # groups of 16, 32, 1 and 3
# their plain means round: in float32 all but that of the one
EQUAL = [0.7] * 16 + [0.96] * 32 + [1e-3] + [-1 / 3] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_are_their_own_mean_in_groups_of_any_size(dtype):
    values = torch.tensor(EQUAL, dtype=dtype)
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    for order in (torch.arange(len(values)), shuffled):
        least, mean, count = group_means(values[order], UNEVEN[order])
        assert (
            torch.equal(least + mean, values[order]) and (values[order] - least - mean == 0).all()
        )
        assert count.tolist() == [{5: 16, 2: 32, 9: 1, 4: 3}[g] for g in UNEVEN[order].tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_means_are_the_means(dtype):
    """Against a loop in float64; the error is that of adding up to 32 numbers below 3 in this
    dtype.
    """
    values = torch.randn(
        len(UNEVEN), dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).to(dtype)
    least, mean, _ = group_means(values, UNEVEN)
    naive = torch.stack([values.double()[g == UNEVEN].mean() for g in UNEVEN])
    assert ((least + mean).double() - naive).abs().max() < 32 * torch.finfo(dtype).eps
    assert torch.equal(least, torch.stack([values[g == UNEVEN].min() for g in UNEVEN]))


def test_group_means_of_several_numbers_are_those_of_each():
    values = torch.randn(
        len(UNEVEN), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    for several, single in zip(
        group_means(values, UNEVEN), zip(*(group_means(v, UNEVEN) for v in values.T))
    ):
        assert torch.equal(several, torch.stack(single, 1))


def test_a_value_that_is_hardly_another_deviates_by_no_more_than_it_does():
    """Fifteen of 0.7 and one a rounding u above it: u (1 - 1/16) and -u / 16, where a rounded mean
    would say u or 0.
    """
    values = torch.tensor([0.7] * 16)
    values[3] = torch.nextafter(values[3], torch.tensor(1.0))
    least, mean, _ = group_means(values, torch.zeros(16))
    u = (values[3] - values[0]).item()
    assert (values - least - mean).tolist() == [
        u * 15 / 16 if i == 3 else -u / 16 for i in range(16)
    ]


def test_an_infinite_value_spoils_its_own_group_only():
    values, group = (
        numbers(-math.inf, 1.0, math.nan, 1.0, 2.0, 4.0),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    least, mean, _ = group_means(values, group)
    assert (
        close((least + mean)[4:], [3.0, 3.0], 12) and (least + mean)[:2].tolist() == [-math.inf] * 2
    )
    assert (least + mean)[2:4].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_deviations_of_what_is_selected(dtype):
    values = torch.full((7, 11), 0.7, dtype=dtype)
    mask = torch.rand(7, 11, generator=torch.Generator().manual_seed(3)) < 0.8
    values[~mask] = math.nan
    assert (deviations(values, mask)[mask] == 0).all()
    few = torch.tensor([[1.0, 2.0, math.nan, 6.0]], dtype=dtype)
    assert deviations(few, ~few.isnan())[~few.isnan()].tolist() == [-2, -1, 3]
    assert deviations(few, few > 9).shape == few.shape  # none is selected


# -------------------------------------------------------------------------------------- keyed draws


def draws(seed=0, step=0, salt="a", keys=256, length=512, dtype=torch.float64):
    return keyed_uniform(seed, step, salt, torch.arange(keys), length, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_uniform(dtype):
    u = draws(dtype=dtype).flatten().double()
    assert u.min() >= 0 and u.max() < 1
    n, distance = len(u), (u.sort().values - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()
    assert distance * math.sqrt(n) < 1.63  # Kolmogorov-Smirnov at 1 %
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 93  # chi-square, 63 degrees of freedom, 1 %


def test_neighbours_are_independent():
    u = draws() - 0.5
    n = u.numel()
    for a, b in (
        (u[:, 1:], u[:, :-1]),
        (u[1:], u[:-1]),
        (u, draws(step=1) - 0.5),
        (u, draws(seed=1) - 0.5),
        (u, draws(salt="b") - 0.5),
    ):
        assert abs((a * b).sum() * 12) / math.sqrt(n) < 3.5


def test_a_draw_is_a_function_of_seed_step_formula_rollout_and_position():
    u = draws()
    assert torch.equal(u, draws()) and torch.equal(u[:, :100], draws(length=100))  # padding
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    # order, micro-batches, ranks
    assert torch.equal(keyed_uniform(0, 0, "a", order, 512, torch.float64), u[order])
    for other in (
        draws(seed=1),
        draws(step=1),
        draws(salt="b"),
        draws(seed=2**40),
        u.roll(1, 0),
        u.roll(1, 1),
    ):
        assert (other == u).double().mean() < 1e-3
    assert not torch.equal(draws(seed=0, step=1), draws(seed=1, step=0))


def test_draws_stay_what_they_were():
    """A resumed run must see the draws of the run it continues, on another machine and release."""
    assert close(
        draws(keys=2, length=2),
        [[0.035765048158, 0.051973546619], [0.338684243474, 0.809984837983]],
        12,
    )
