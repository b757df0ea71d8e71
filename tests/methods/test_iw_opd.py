"""IW-OPD: weights by the share of the gap spent before a token."""

from __future__ import annotations

import pytest
import torch

from opdkit.methods.method import load
from opdkit.testing import evaluate, fabricate
from tests.methods.ragged import on, shifted
from tests.methods.toy import close, numbers


def run(gaps, method=None, mask=None, **arguments):
    """The evaluation of rollouts with these gaps log pi_t - log pi_s."""
    student = [[-3.0] * len(row) for row in gaps]
    return on(
        method or load("iw_opd", **arguments), student, models={"teacher": shifted(gaps, -3.0)}
    )


@pytest.mark.parametrize(
    ("gaps", "weights", "credits"),
    [
        ((0.2, -0.3, 0.5), (1.5, 1.4, 1.25), (0.3, -0.42, 0.625)),
        (
            (-2, 0.1, 0, -0.9, 1),
            (1.5, 1.25, 1.2375, 1.2375, 1.125),
            (-3, 0.125, 0, -1.11375, 1.125),
        ),
        ((0.7, 0.7, 0.7, 0.7), (1.5, 1.375, 1.25, 1.125), (1.05, 0.9625, 0.875, 0.7875)),
        ((0.4,), (1.5,), (0.6,)),
    ],
)
def test_weights(gaps, weights, credits):
    out = run([gaps])
    assert close(out.terms[0].weight[0], weights) and close(
        (out.terms[0].weight * out.terms[0].credit)[0], credits
    )
    assert close(out.loss, -sum(credits) / len(credits))


def test_mean_weight():
    assert run([(-2, 0.1, 0, -0.9, 1)]).terms[0].weight.mean().item() == pytest.approx(
        1.27, abs=1e-7
    )
    out = run([(-2, 0.1, 0, -0.9, 1)], mean_one=True)
    assert close(out.terms[0].weight.mean(), 1.0) and close(
        out.terms[0].weight[0] * 1.27, (1.5, 1.25, 1.2375, 1.2375, 1.125)
    )


def test_first_last_and_between():
    gaps = (
        torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        .mul(0.5)
        .clamp(-2.9, 2.9)
    )
    weight = run([gaps.tolist()], gamma=0.8).terms[0].weight[0]
    assert weight[0] == 1.8 and close(
        weight[-1], 1 + 0.8 * (gaps[-1].abs() / gaps.abs().sum()).item()
    )
    assert (weight.diff() <= 1e-12).all() and (weight > 1).all()


def test_a_gap_of_zero_spends_nothing():
    weight = run([(0.5, 0.0, 0.0, 0.5)]).terms[0].weight[0]
    assert weight[1] == weight[2] == weight[3] and close(weight, (1.5, 1.25, 1.25, 1.25))


def test_at_gamma_zero_it_is_opd_bit_for_bit():
    case = fabricate(load("opd").objective)
    ours, opd = (
        case.run(load(m, **a).objective) for m, a in (("iw_opd", {"gamma": 0.0}), ("opd", {}))
    )
    assert torch.equal(ours.loss, opd.loss) and torch.equal(ours.grad, opd.grad)


def test_scaling_all_gaps_leaves_the_weights():
    a, b = (run([[c * g for g in (0.2, -0.3, 0.5)]]).terms[0] for c in (1, 3))
    assert close(a.weight, b.weight) and close(b.credit, 3 * a.credit)


def test_agreement_has_the_greatest_weight_and_no_credit():
    out = run([(0.0, 0.0, 0.0)])
    assert (
        (out.terms[0].weight == 1.5).all()
        and (out.terms[0].credit == 0).all()
        and (out.grad == 0).all()
    )


def test_tokens_that_are_not_trained_spend_nothing():
    def weights(gaps, mask):
        logits = torch.zeros(1, len(gaps), 2, dtype=torch.float64)
        teacher = torch.stack([numbers(*gaps) * 2, torch.zeros(len(gaps)).double()], -1)[None]
        ids = torch.zeros(1, len(gaps), dtype=torch.int64)
        return (
            evaluate(load("iw_opd"), logits, ids, torch.tensor([mask]), {"teacher": teacher})
            .terms[0]
            .weight[0]
        )

    three = weights((0.2, -0.3, 0.5), [True] * 3)
    assert close(weights((0.2, -0.3, 0.5, 9.0), [True] * 3 + [False])[:3], three, 12)  # padding
    hole = weights((0.2, 9.0, -0.3, 0.5), [True, False, True, True])  # a tool's token
    assert close(hole[[0, 2, 3]], three, 12) and hole[1] == 0


def test_weights_are_of_the_rollout_alone():
    gaps = [(0.2, -0.3, 0.5), (-2, 0.1, 0, -0.9, 1), (0.4,)]
    together = run(gaps).terms[0].weight
    for row, weight in zip(gaps, together):
        assert close(weight[: len(row)], run([row]).terms[0].weight[0], 12)
    assert close(run(gaps[::-1]).terms[0].weight, together.flip(0), 12)


def test_the_gap_is_that_before_the_step():
    out = on(
        load("iw_opd"), [[-1.0, -2.0]], before=[[-1.5, -1.5]], models={"teacher": [[-1.3, -1.8]]}
    )
    assert close(out.terms[0].credit[0], (0.2, -0.3)) and close(out.terms[0].weight[0], (1.5, 1.3))
