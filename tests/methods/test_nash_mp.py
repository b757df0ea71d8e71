"""Nash mirror prox: its closed form on small games, and a stochastic step whose mean is the
gradient of the exact one.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

import opdkit
from opdkit.base.errors import UserError
from opdkit.curricula import Opposed
from opdkit.methods.method import load
from opdkit.methods.nash_mp import half_step, mirror_prox
from opdkit.objective import Ema
from opdkit.testing import check, evaluate
from tests.methods.steps import GROUPS, agrees, at, step
from tests.methods.toy import close, numbers

GAME = numbers(0.5, 0.9, 0.2, 0.1, 0.5, 0.8, 0.8, 0.2, 0.5).view(3, 3)  # P(row > column): a circle
REF, BETA, ETA = numbers(0.5, 0.3, 0.2), 0.2, 0.4


def kl(p, q):
    return (p * (p / q).log()).sum()


def iterate(number, beats=GAME, reference=REF, beta=BETA, eta=ETA, halves=2):
    """pi of this number."""
    every = mirror_prox(beats, reference, beta, eta, halves)
    return next(itertools.islice(every, number, None))


def test_the_first_iteration():
    lost = REF @ GAME
    assert close(lost, [0.44, 0.64, 0.44])
    half = half_step(REF, REF, lost, BETA, ETA)
    assert close(half, [0.540282, 0.243606, 0.216113])
    assert close(half_step(REF, REF, half @ GAME, BETA, ETA), [0.527720, 0.243482, 0.228798])
    assert close(iterate(1), [0.527720, 0.243482, 0.228798]) and torch.equal(iterate(0), REF)


def test_the_closed_form_is_the_minimum():
    """By autograd in the logits: the objective is stationary there, and higher a little apart."""
    anchor, opponent = numbers(0.2, 0.2, 0.6), numbers(0.3, 0.6, 0.1)
    found = half_step(REF, anchor, opponent @ GAME, BETA, ETA)

    def objective(z):
        p = z.softmax(-1)
        return (p * (opponent @ GAME)).sum() / BETA + kl(p, REF) + kl(p, anchor) / ETA

    z = found.log().requires_grad_()
    (slope,) = torch.autograd.grad(objective(z), z)
    assert slope.abs().max() < 1e-12
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        apart = found.log() + 0.1 * torch.randn(3, generator=g, dtype=torch.float64)
        assert objective(apart) > objective(found.log())


def test_the_equilibrium():
    star = iterate(300)
    assert close(star, [0.480727, 0.196270, 0.323003])
    fixed = REF * (-(star @ GAME) / BETA).exp()
    assert (fixed / fixed.sum() - star).abs().max() < 1e-8


def test_it_converges_at_the_rate_that_is_promised():
    star = iterate(300)
    apart = [kl(star, iterate(k)) for k in range(8)]
    assert close(torch.stack(apart[:4]), [0.052657, 0.024237, 0.011301, 0.005261])
    assert all(b / a <= 1 / (1 + 2 * BETA) for a, b in itertools.pairwise(apart))


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.3, 1.0])
def test_the_rate_holds_in_random_games(beta):
    """eta = 2 beta, P(y > y') + P(y' > y) = 1; ten games of four answers each."""
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        upper = torch.rand(4, 4, generator=g, dtype=torch.float64).triu(1)
        beats = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(4, dtype=torch.float64)
        assert torch.equal(beats + beats.T, torch.ones(4, 4, dtype=torch.float64))
        reference = torch.rand(4, generator=g, dtype=torch.float64).softmax(-1)
        every = mirror_prox(beats, reference, beta, 2 * beta)
        *policies, star = itertools.islice(every, round(25 / beta))
        apart = [kl(star, p) for p in policies[:6]]
        assert all(b <= a / (1 + 2 * beta) + 1e-12 for a, b in itertools.pairwise(apart))


def test_at_the_ends_of_the_step_size():
    lost, anchor = REF @ GAME, numbers(0.2, 0.2, 0.6)
    best = REF * (-lost / BETA).exp()
    assert close(half_step(REF, anchor, lost, BETA, 1e12), best / best.sum(), 9)
    assert close(half_step(REF, anchor, lost, BETA, 1e-12), anchor, 9)


def test_where_nothing_is_better_it_goes_to_the_reference_in_even_steps():
    even = torch.full((3, 3), 0.5, dtype=torch.float64)
    pi, anchor = numbers(0.2, 0.2, 0.6), numbers(0.2, 0.2, 0.6)
    for _ in range(5):
        mean = (ETA * REF.log() + pi.log()) / (1 + ETA)
        pi = half_step(REF, pi, pi @ even, BETA, ETA)
        assert close(pi, mean.softmax(-1), 12)
    assert kl(pi, REF) < kl(anchor, REF)
    assert close(iterate(50, even), REF, 12)


def test_a_constant_and_the_other_side_of_a_judgement_change_nothing():
    lost = REF @ GAME
    there = half_step(REF, REF, lost, BETA, ETA)
    assert close(half_step(REF, REF, lost + 0.3, BETA, ETA), there, 12)
    assert close(half_step(REF, REF, 1 - GAME @ REF, BETA, ETA), there, 12)


def test_without_the_half_step_it_goes_round():
    """beta .02, eta .04: after 500 iterations mirror descent is as far as ever."""
    beta, eta = 0.02, 0.04
    star = iterate(3000, beta=beta, eta=eta)
    assert close(kl(star, iterate(500, beta=beta, eta=eta, halves=1)), 0.426, 3)
    assert kl(star, iterate(500, beta=beta, eta=eta)) < 1e-12
    # with a step of ten times beta neither arrives
    for halves in (1, 2):
        assert kl(star, iterate(500, beta=beta, eta=10 * beta, halves=halves)) > 0.01


# ------------------------------------------------------------------------------ the stochastic step


def one(logits, y, reward, **arguments):
    """[3]: the gradient for one response of one token."""
    out = evaluate(
        load("nash_mp", beta=BETA, eta=ETA, **arguments),
        logits.view(1, 1, 3),
        torch.tensor([[y]]),
        models={"reference": REF.log().view(1, 1, 3), "anchor": ANCHOR.log().view(1, 1, 3)},
        reward=[reward],
        group=[0],
    )
    return out.grad[0, 0]


ANCHOR = numbers(0.2, 0.2, 0.6)


@pytest.mark.parametrize("opponent", [ANCHOR, numbers(0.1, 0.7, 0.2)])
def test_its_mean_is_the_gradient_of_the_exact_objective(opponent):
    """Over what the student and the opponent may say, for a judge that draws who wins too."""
    pi = numbers(0.1, 0.7, 0.2)
    z = pi.log().requires_grad_()
    p = z.softmax(-1)
    exact = (p * (opponent @ GAME)).sum() + BETA * kl(p, REF) + BETA / ETA * kl(p, ANCHOR)
    (slope,) = torch.autograd.grad(exact, z)
    sampled = sum(
        pi[y] * opponent[other] * one(pi.log(), y, GAME[y, other].item())
        for y, other in itertools.product(range(3), repeat=2)
    )
    drawn = sum(
        pi[y] * opponent[other] * chance * one(pi.log(), y, won)
        for y, other in itertools.product(range(3), repeat=2)
        for won, chance in ((1.0, GAME[y, other]), (0.0, GAME[other, y]))
    )
    assert close(sampled, slope, 12) and close(drawn, slope, 12)


def test_leaving_one_out_has_the_same_mean():
    pi = numbers(0.1, 0.7, 0.2)
    exact = sum(pi[y] * one(pi.log(), y, (GAME @ ANCHOR)[y].item()) for y in range(3))
    total = torch.zeros(3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        out = evaluate(
            load("nash_mp", beta=BETA, eta=ETA, baseline="leave_one_out"),
            pi.log().expand(2, 1, 3),
            torch.tensor([[a], [b]]),
            models={
                name: q.log().expand(2, 1, 3)
                for name, q in (("reference", REF), ("anchor", ANCHOR))
            },
            reward=(GAME @ ANCHOR)[[a, b]],
            group=[0, 0],
        )
        total += pi[a] * pi[b] * out.grad.sum(0)[0]
    assert close(total, exact, 12)


def test_at_the_equilibrium_the_mean_step_is_zero():
    """Against itself, with the anchor there too."""
    star = iterate(400)
    total = torch.zeros(3, dtype=torch.float64)
    for y, other in itertools.product(range(3), repeat=2):
        out = evaluate(
            load("nash_mp", beta=BETA, eta=ETA),
            star.log().view(1, 1, 3),
            torch.tensor([[y]]),
            models={"reference": REF.log().view(1, 1, 3), "anchor": star.log().view(1, 1, 3)},
            reward=[GAME[y, other].item()],
            group=[0],
        )
        total += star[y] * star[other] * out.grad[0, 0]
    assert total.abs().max() < 1e-9


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("baseline", ["half", "leave_one_out"])
def test_it_is_the_naive_formula(baseline, fresh):
    case = step(2, fresh, ("reference", "anchor"))
    reward = torch.as_tensor(case.columns["reward"])

    def reference(ls, said):
        own, mask = at(said["before"], case.tokens), case.mask
        apart = {
            name: torch.where(mask, own - at(said[name], case.tokens), 0.0).sum(1)
            for name in ("reference", "anchor")
        }
        u = 1 - reward + 0.3 * apart["reference"] + 0.3 / 0.7 * apart["anchor"]
        if baseline == "half":
            a = u - 0.5
        else:
            others = [[i for i in range(6) if i != b and GROUPS[i] == GROUPS[b]] for b in range(6)]
            a = torch.stack([u[b] - u[others[b]].mean() for b in range(6)])
        ratio = (at(ls, case.tokens) - at(said["sampler"], case.tokens)).exp()
        return torch.where(mask, ratio * a[:, None], 0.0).sum() / 6

    assert agrees(load("nash_mp", beta=0.3, eta=0.7, baseline=baseline), case, reference)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"baseline": "leave_one_out"}, {"kappa": 0.0, "every": 4}, {"clip": 0.2}, {"eta": 5.0}],
)
def test_check(arguments):
    check(load("nash_mp", **arguments))


def test_who_plays_and_how_the_anchor_follows():
    made = load("nash_mp", kappa=0.9)
    assert made.curriculum == Opposed("anchor") and made.companions == (Ema(0.1, 1, "anchor"),)
    assert made.opened == {"reference"} and made.brought == {"anchor"}
    hard = load("nash_mp", kappa=0.0, every=2)
    assert hard.companions == (Ema(1.0, 2, "anchor"),)
    for arguments, said in (
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"eta": 0.0}, "eta=0.0 must be positive"),
        ({"kappa": 1.5}, "kappa=1.5 must lie in"),
        ({"baseline": "mean"}, "one of half, leave_one_out"),
        ({"every": 0}, "every=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            load("nash_mp", **arguments)


def test_the_example_shows_one_arrive_and_the_other_go_round():
    file = Path(opdkit.__file__).parents[1] / "examples" / "nash_mirror_prox.py"
    spec = importlib.util.spec_from_file_location("nash_mirror_prox", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    apart = example.distances(0.02)
    assert apart["mirror prox"][-1] < 1e-12 and apart["mirror prox"][4] < 0.02
    assert apart["mirror descent"][-1] == pytest.approx(0.426, abs=5e-4)
    assert apart["mirror descent"] == sorted(apart["mirror descent"])
    assert example.distances(0.2)["mirror descent"][-1] < 1e-6
