"""REOPOLD: the floor, the two masks, their denominators and limits."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective.maths import masked_quantile, mixture
from opdkit.testing import check, evaluate
from tests.methods.toy import binary, close, numbers, tokens, with_entropy

R = (-4, -1, 0.5, 0, -0.2)
EARLY, LATE = {"step": 0, "total_steps": 2}, {"step": 1, "total_steps": 2}


def run(method, phase, ratios=R):
    base = math.log(0.25)
    student, teacher = binary([base] * len(ratios)), binary([base + r for r in ratios])
    return evaluate(
        method, student, tokens(*[0] * len(ratios)), models={"teacher": teacher}, **phase
    )


@pytest.mark.parametrize(
    ("lam", "floor"),
    [(0.1, -2.558428), (0.2, -2.011797), (0.3, -1.719961), (0.5, -1.386294), (0.999999, -1.0)],
)
def test_floor(lam, floor):
    assert close(
        run(load("reopold", lam=lam), EARLY, (-9.0,)).terms[0].credit,
        [[floor]],
        5 if lam > 0.9 else 6,
    )


def test_first_phase_drops_floored_tokens():
    out = run(load("reopold"), EARLY)
    assert close(out.terms[0].credit, [[-2.558428, -1, 0.5, 0, -0.2]])
    assert out.terms[0].weight.tolist() == [[0, 1, 1, 1, 1]] and out.terms[0].denominator == 4
    assert close(out.loss, 0.175)
    assert (out.grad[0, 0] == 0).all()


def test_second_phase_keeps_the_most_uncertain_tokens_and_the_floor():
    student = torch.stack([with_entropy(h) for h in (0.1, 2.0, 0.3, 1.2, 0.05)])
    wanted = student[:, 1] * numbers(*R).exp()  # token 1 is sampled
    teacher = student * ((1 - wanted) / (1 - student[:, 1]))[:, None]
    teacher[:, 1] = wanted
    out = evaluate(
        load("reopold"),
        student.log()[None],
        tokens(*[1] * 5),
        models={"teacher": teacher.log()[None]},
        **LATE,
    )
    # the quantile is 1.36; "lower" (1.2) would keep two
    assert out.terms[0].weight.tolist() == [[0, 1, 0, 0, 0]]
    assert close(out.loss, 1.0) and close(out.terms[0].credit[0, 0], -2.558428)


def test_quantile_is_linear_and_finds_the_value_it_falls_on():
    values = numbers(0.1, 2.0, 0.3, 1.2, 0.05)
    assert close(masked_quantile(values, torch.ones(5, dtype=torch.bool), 0.8), 1.36, 12)
    eleven = torch.arange(11.0)
    assert masked_quantile(eleven, eleven >= 0, 1 - 0.7) == 3  # 0.30000000000000004 * 10
    assert masked_quantile(eleven, eleven > 99, 0.5) == 0


@pytest.mark.parametrize(
    ("r", "mixed", "bound"),
    [(-6, -2.280522, -2.302585), (-0.5, -0.437145, -0.45), (0, 0, 0), (0.5, 0.459858, 0.45)],
)
def test_the_mixture_lies_above_the_relaxed_credit(r, mixed, bound):
    value = mixture(numbers(0), numbers(r), 0.1)  # log(lam + (1 - lam) e^R)
    relaxed = 0.9 * run(load("reopold"), EARLY, (r,)).terms[0].credit
    assert close(value, [mixed]) and close(relaxed, [[bound]]) and value >= relaxed - 1e-12


def test_without_floor_and_switch_it_is_opd():
    ours, plain = run(load("reopold", lam=1e-30, switch=1.0), LATE), run(load("opd"), LATE)
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.grad, plain.grad)


def test_switch_is_half_of_the_run():
    # -4 is floored early; alone, it is the most uncertain token late
    for step, weight in ((149, 0), (150, 1)):
        assert (
            run(load("reopold"), {"step": step, "total_steps": 300}, (-4.0,)).terms[0].weight.item()
            == weight
        )


@pytest.mark.parametrize("phase", [EARLY, LATE])
def test_agreement_and_nothing_kept_are_zero(phase):
    same = run(load("reopold"), phase, (0.0, 0.0))
    assert same.loss == 0 and (same.grad == 0).all()
    floored = run(load("reopold", keep=0.0), EARLY, (-9.0, -9.0))
    assert floored.loss == 0 and (floored.grad == 0).all()


def test_keeping_all_keeps_all():
    assert (run(load("reopold", keep=1.0), LATE).terms[0].weight == 1).all()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"switch": 0.0}, {"switch": 0.0, "keep": 1.0}, {"clip": (0.2, 0.28), "rollout_cap": 5}],
)
def test_check(arguments):
    check(load("reopold", **arguments))


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="mixture"):
        load("reopold", lam=1.0)
    with pytest.raises(UserError, match="share of tokens"):
        load("reopold", keep=1.5)
