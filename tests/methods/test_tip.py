"""TIP: scores, selections and losses of the card's two rollouts; the sampled selection's odds."""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.methods.tip import Highest, SampleKeys, Spread
from opdkit.objective import Batch, Const, Entropy, EntropyFact, Gap, GapFact, ReverseKL
from opdkit.testing import check, evaluate
from tests.methods.toy import at_distance, close, numbers, with_entropy

ENTROPIES, GAPS = (0.1, 2.0, 0.05, 1.0, 0.4, 0.02), (0.0, 0.1, 1.5, 0.7, 0.05, 0.3)
MASK = torch.tensor([[True] * 4, [True, True, False, False]])
SCORE = (
    Spread(Entropy("student"), 0.98)
    + Spread(Gap())
    - Spread(Entropy("student"), 0.98) * Spread(Gap())
)


def table(values):
    """[2, 4] (or [2, 4, V]): rollouts of four tokens and of two."""
    padded = torch.full((2, 4, *values.shape[1:]), 9.0, dtype=torch.float64)
    padded[MASK] = values
    return padded


def rollouts():
    student = torch.stack([with_entropy(h) for h in ENTROPIES])
    teacher = torch.stack([at_distance(p, d) for p, d in zip(student, GAPS)])
    return table(student.log()), {"teacher": table(teacher.log())}


def run(**arguments):
    student, teacher = rollouts()
    return evaluate(
        load("tip", **arguments),
        student,
        torch.zeros(2, 4, dtype=torch.int64),
        MASK,
        models=teacher,
    )


def batch(entropies, gaps, mask=MASK, **settings):
    facts = {EntropyFact("student"): entropies, GapFact(ReverseKL(), "student", "teacher"): gaps}
    return Batch(
        torch.zeros(mask.shape, dtype=torch.int64), mask, facts, dtype=torch.float64, **settings
    )


def test_scores():
    step = batch(table(numbers(*ENTROPIES)), table(numbers(*GAPS)))
    assert close(
        Spread(Entropy("student"), 0.98)(step)[MASK], (0.042553, 1, 0.015957, 0.521277, 0.202128, 0)
    )
    assert close(Spread(Gap())(step)[MASK], (0, 0.066667, 1, 0.466667, 0.033333, 0.2))
    assert close(SCORE(step)[MASK], (0.042553, 1, 1, 0.744681, 0.228723, 0.2))


@pytest.mark.parametrize(
    ("arguments", "kept", "loss"),
    [
        ({}, [0, 1, 1, 0, 1, 0], 0.55),
        ({"score": "entropy"}, [0, 1, 0, 1, 1, 0], 0.283333),
        ({"share": 1.0}, [1] * 6, 0.441667),
        ({"score": "q3"}, [1, 0, 1, 0, 0, 1], 0.6),  # of the three least uncertain
    ],
)
def test_selection_and_loss(arguments, kept, loss):
    out = run(**arguments)
    assert out.terms[0].weight[MASK].tolist() == kept
    assert out.terms[0].denominator == sum(kept)
    assert close(out.loss, loss)
    assert (out.grad[out.terms[0].weight == 0] == 0).all()


def test_all_tokens_are_opd_over_the_vocabulary():
    student, teacher = rollouts()
    full = evaluate(
        load("opd", support="full"),
        student,
        torch.zeros(2, 4, dtype=torch.int64),
        MASK,
        models=teacher,
    )
    ours = run(share=1.0)
    assert close(ours.loss, full.loss.item(), 12) and close(ours.grad, full.grad, 12)


def test_scores_are_bounded_and_do_not_change_with_the_scale_of_the_gap():
    g = torch.Generator().manual_seed(0)
    h, d = (torch.rand(2, 4, generator=g, dtype=torch.float64) for _ in range(2))
    step, moved, spoiled = (
        batch(h, d),
        batch(h, 3 * d + 7),
        batch(h.masked_fill(~MASK, 1e6), d.masked_fill(~MASK, -1e6)),
    )
    score, parts = (
        SCORE(step)[MASK],
        [s(step)[MASK] for s in (Spread(Entropy("student"), 0.98), Spread(Gap()))],
    )
    assert (score >= torch.maximum(*parts) - 1e-12).all() and (score <= 1 + 1e-12).all()
    assert ((score > 1 - 1e-12) == (torch.maximum(*parts) > 1 - 1e-12)).all()
    assert close(SCORE(moved)[MASK], score, 12)
    assert torch.equal(SCORE(spoiled)[MASK], score)


def test_agreement_scores_by_entropy_and_costs_nothing():
    student, _ = rollouts()
    out = evaluate(
        load("tip"),
        student,
        torch.zeros(2, 4, dtype=torch.int64),
        MASK,
        models={"teacher": student},
    )
    assert out.terms[0].weight[MASK].tolist() == [0, 1, 0, 1, 1, 0]
    assert close(out.loss, 0.0, 12) and close(out.grad, torch.zeros_like(student), 12)


def test_a_rollout_of_one_token():
    short = torch.tensor([[True, False, False, False], [True] * 4])
    step = batch(torch.ones(2, 4), torch.ones(2, 4), short)
    # ties: the earlier
    assert Highest(Gap(), 0.5, Const(1))(step).tolist() == [[False] * 4, [True, True, False, False]]
    assert Highest(Gap(), 0.5, Const(1), least=1)(step).tolist() == [
        [True, False, False, False],
        [True, True, False, False],
    ]
    hundred = batch(torch.ones(1, 100), torch.ones(1, 100), torch.ones(1, 100, dtype=torch.bool))
    assert Highest(Gap(), 0.29, Const(1))(hundred).sum() == 29


def test_first_draws_have_the_odds_of_entropy():
    draws, n = torch.Generator().manual_seed(1), 100_000
    entropies = numbers(*ENTROPIES).expand(n, -1)
    step = batch(
        entropies,
        entropies,
        entropies > 0,
        uniform=torch.rand(n, 6, generator=draws, dtype=torch.float64),
    )
    first = SampleKeys(Entropy("student"))(step).argmax(1)
    shares, odds = (
        torch.bincount(first, minlength=6) / n,
        numbers(0.028011, 0.560224, 0.014006, 0.280112, 0.112045, 0.005602),
    )
    assert ((shares - odds).abs() < 4 * (odds * (1 - odds) / n).sqrt()).all()


@pytest.mark.parametrize(("share", "kept"), [(0.5, 3), (0.01, 1), (1.0, 6)])
def test_sampling_draws_from_the_step(share, kept):
    out = run(selection="sample", score="entropy", share=share)
    assert out.terms[0].weight.sum() == kept and (out.terms[0].weight[~MASK] == 0).all()


@pytest.mark.parametrize("score", ["soft_or", "entropy", "q3"])
@pytest.mark.parametrize("selection", ["top", "sample"])
def test_check(score, selection):
    check(load("tip", score=score, selection=selection))


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="soft_or, entropy, q3"):
        load("tip", score="gradient")
    with pytest.raises(UserError, match="share of tokens"):
        load("tip", share=0.0)
