"""Faults of masks, alignment and reduction that other systems shipped (PITFALLS M2 to M7, M9):
named by their number.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opdkit.methods import METHODS
from opdkit.methods.grpo import SequenceClipped
from opdkit.methods.method import load
from opdkit.objective.facts import LogpFact
from opdkit.objective.grammar import Objective, Term
from opdkit.objective.losses import Divergence, Likelihood, PolicyGradient
from opdkit.objective.signals import Advantage, Entropy, Exp, LogRatio, MeanOne
from opdkit.testing import Case, evaluate, fabricate
from opdkit.types import Rollout
from tests.common.toy import P, Q
from tests.methods.ragged import mask_of, on, ragged, slopes
from tests.methods.toy import close, logits, numbers

GROUP_ONE = ["opd", "gkd", "gopd", "exopd", "tropd", "iw_opd", "position_opd", "scope", "vopd"]


def test_M2_column_t_of_every_model_scores_token_t():
    objective = load("exopd").objective
    case = fabricate(objective)
    batch = case.batch(objective)
    for name, z in {"student": case.before, "sampler": case.sampler, **case.models}.items():
        if LogpFact(name) in batch.facts:
            for b, t in case.mask.nonzero().tolist():
                assert close(
                    batch[name].logp[b, t], z[b, t].log_softmax(-1)[case.tokens[b, t]].item(), 12
                )


def test_M2_a_teacher_one_position_off_is_seen():
    student = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    for name in ("opd", "gkd", "vopd"):
        right, off = (
            evaluate(load(name), student, ids, models={"teacher": t})
            for t in (student, student.roll(1, 1))
        )
        assert abs(right.loss) < 1e-15 and right.grad.norm() < 1e-15 and off.grad.norm() > 0.01


@pytest.mark.parametrize("name", GROUP_ONE)
def test_M3_empty_responses(name):
    """In a row, in a micro-batch, in the whole step."""
    objective = load(name).objective
    case = fabricate(objective)
    for empty in ([2], [0, 1, 2], range(6)):
        mask = case.mask.clone()
        mask[list(empty)] = False
        out = replace(case, mask=mask).run(objective, [[0, 1, 2], [3, 4], [5]])
        assert (
            out.loss.isfinite() and out.grad.isfinite().all() and (out.grad[list(empty)] == 0).all()
        )
        assert (out.loss == 0) == (len(empty) == 6)
        assert all(t.denominator.min() >= 1 for t in out.terms)


@pytest.mark.parametrize("name", GROUP_ONE)
def test_M3_an_empty_row_is_as_good_as_none(name):
    objective = load(name).objective
    case = fabricate(objective)
    mask = case.mask.clone()
    mask[4] = False
    keep = torch.tensor([0, 1, 2, 3, 5])
    fewer = Case(
        case.tokens[keep],
        case.student[keep],
        case.mask[keep],
        {k: v[keep] for k, v in case.models.items()},
        case.before[keep],
        case.sampler[keep],
        {k: torch.as_tensor(v)[keep] for k, v in case.columns.items()},
        {k: v[keep] for k, v in case.marks.items()},
        case.settings | {"keys": case.settings["keys"][keep]},
    )
    # its prompts then have other members; compare where the row was alone in its set
    if name == "scope":
        mask[4], keep = case.mask[4], torch.arange(6)
        fewer = case
    a, b = replace(case, mask=mask).run(objective), fewer.run(objective)
    assert close(a.loss, b.loss.item(), 12) and close(a.grad[keep], b.grad, 12)


# one token of loss 1 in one rollout, nine of loss 3 in another
LOSSES = [[-1.0], [-3.0] * 9]
STEP = Case(torch.zeros(2, 9, dtype=torch.int64), ragged(LOSSES), mask_of(LOSSES))


@pytest.mark.parametrize(
    ("over", "value"),
    [("tokens", 2.8), ("own", 2.8), ("rows", 2.0), ("row_sums", 14.0), (9, 28 / 18), (100, 0.14)],
)
def test_M4_denominators(over, value):
    objective = Objective(Likelihood().per(over))
    for parts in (None, [[0], [1]], [[1], [0]]):
        assert close(STEP.run(objective, parts).loss, value, 12)


@pytest.mark.parametrize("over", ["tokens", "own", "rows", "row_sums", 5])
@pytest.mark.parametrize(
    "loss",
    [
        Likelihood() * Entropy("student"),
        PolicyGradient(Advantage()) * 2,
        Divergence("jsd") * Exp(Entropy("teacher")),
    ],
)
def test_M4_micro_batches_do_not_change_the_gradient(loss, over):
    objective = Objective(loss.per(over))
    case = fabricate(objective)
    base = case.run(objective)
    for parts in ([[i] for i in range(6)], [[5, 0], [1, 2, 3], [4]], [[2], [0, 1, 3, 4, 5]]):
        out = case.run(objective, parts)
        assert (out.grad - base.grad).norm() < 1e-9 * base.grad.norm() and close(
            out.loss, base.loss.item(), 12
        )


def test_M4_neither_do_they_for_losses_over_whole_rollouts():
    objective = Objective(SequenceClipped(Advantage()).per("row_sums")) + Likelihood()
    case = fabricate(objective)
    base, split = case.run(objective), case.run(objective, [[i] for i in range(6)], chunk=2)
    assert (split.grad - base.grad).norm() < 1e-9 * base.grad.norm() and close(
        split.loss, base.loss.item(), 12
    )


def test_M5_only_trained_tokens_are_counted_over_the_whole_optimiser_step():
    case = fabricate(load("opd").objective)
    batch = case.batch(load("opd").objective)
    # several optimiser steps may share one batch of rollouts
    for rows in (None, torch.tensor([0, 3]), torch.tensor([2])):
        plan = load("opd").objective.plan(batch, rows)
        trained = case.mask if rows is None else case.mask[rows]
        assert plan.parts[0].denominator == trained.sum() and plan.mask.sum() == trained.sum()
        assert plan.parts[0].weight.sum() == trained.sum()
    assert case.mask.sum() == 27 < case.tokens.numel()


CREDIT = LogRatio("teacher", "student")
ONES = Exp(LogRatio("student", "student"))


@pytest.mark.parametrize(
    "loss", [PolicyGradient(CREDIT), Likelihood(), Divergence("reverse_kl"), Divergence("jsd", k=3)]
)
@pytest.mark.parametrize("over", ["tokens", "own", "rows", "row_sums", 5])
def test_M7_weights_of_one_are_no_weights(loss, over):
    case = fabricate(Objective(Term(loss)))
    plain, ones = case.run(Objective(loss.per(over))), case.run(Objective((loss * ONES).per(over)))
    assert torch.equal(plain.loss, ones.loss) and torch.equal(plain.grad, ones.grad)


def test_M7_a_weight_scales_and_mean_one_divides_by_the_sum_of_weights():
    student, weights = [[-1.0, -2.0], [-3.0]], numbers(2.0, 5.0, 1.0)
    teacher = [[x + w for x, w in zip((-1.0, -2.0), weights[:2].log().tolist())], [-3.0]]
    by = {"models": {"teacher": [[min(x, -1e-9) for x in row] for row in teacher]}}
    w = (
        ragged(by["models"]["teacher"])[mask_of(student)][:, 0]
        - ragged(student)[mask_of(student)][:, 0]
    ).exp()
    losses = numbers(1.0, 2.0, 3.0)
    for over, value in (("tokens", (w * losses).sum() / 3), ("own", (w * losses).sum() / 3)):
        assert close(
            on((Likelihood() * Exp(CREDIT)).per(over), student, **by).loss, value.item(), 12
        )
    assert close(
        on(Likelihood() * MeanOne(Exp(CREDIT)), student, **by).loss,
        ((w * losses).sum() / w.sum()).item(),
        12,
    )
    assert close(slopes(on(Likelihood() * 2, student), student), (-2 / 3,) * 3, 12)


def test_M7_own_counts_selected_tokens_whatever_their_weight():
    student = [[-1.0, -2.0, -3.0]]
    some = (LogRatio("teacher", "student") > 0) * 0.25
    out = on((Likelihood() * some).per("own"), student, models={"teacher": [[-0.5, -2.5, -2.9]]})
    assert out.terms[0].denominator == 2 and close(out.loss, 0.25 * (1 + 3) / 2)


def test_M9_under_top_p_the_sampled_estimator_is_off_by_the_log_of_the_kept_mass():
    p, q = numbers(*P), numbers(*Q)
    kept = torch.tensor([True, True, False, False])  # top_p = 0.85
    mass = p[kept].sum()
    drawn = torch.where(kept, p / mass, 0.0)
    teacher = {"teacher": logits(Q)}

    def credit(y: int) -> torch.Tensor:
        return evaluate(load("opd"), logits(P), torch.tensor([[y]]), models=teacher).terms[0].credit

    estimate = sum(d * -credit(y) for y, d in enumerate(drawn) if d > 0).item()
    truth = (drawn[kept] * (drawn[kept] / q[kept]).log()).sum().item()
    assert estimate - truth == pytest.approx(mass.log().item(), abs=1e-12) and mass.log() < -0.1
    # a rollout carries both log-probs, so that the difference is at hand
    y = 0
    rollout = Rollout("r", [1], [y], [True], [p[y].log().item()], [drawn[y].log().item()], "g")
    assert rollout.logp[0] - rollout.drawn_logp[0] == pytest.approx(mass.log().item(), abs=1e-12)
    assert math.isclose(estimate - (rollout.logp[0] - rollout.drawn_logp[0]), truth, abs_tol=1e-12)


def test_M9_full_divergences_do_not_see_how_the_token_was_drawn():
    grads = [
        evaluate(load("gkd"), logits(P), torch.tensor([[y]]), models={"teacher": logits(Q)}).grad
        for y in range(4)
    ]
    assert all(torch.equal(g, grads[0]) for g in grads)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"vla_opd"}))  # acts in 256 bins
def test_M6_what_models_say_at_tokens_of_an_environment_changes_nothing(name: str) -> None:
    """Neither in prefix sums nor in means or variances: with other distributions there, of the
    student and of every teacher, the gradient is the same at all tokens.
    """
    method, draw = load(name), torch.Generator().manual_seed(5)

    def random() -> torch.Tensor:
        return 2 * torch.randn(4, 12, 40, generator=draw, dtype=torch.float64)

    tokens = torch.randint(3, 40, (4, 12), generator=draw)
    own = torch.rand(4, 12, generator=draw) > 0.4
    own[:, 0], own[:, 5] = True, False
    more = {
        "group": torch.tensor([0, 0, 1, 1]),
        "reward": torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64),
        "correct": torch.tensor([True, False, True, False]),
        "turn": (torch.arange(12) // 4).expand(4, 12),
    }
    student = random()
    others = {n: random() for n in method.needs.models if n not in ("student", "sampler")}
    found = evaluate(method, student, tokens, own, others, **more).grad
    student, *moved = (
        torch.where(own[..., None], z, z + random()) for z in (student, *others.values())
    )
    again = evaluate(method, student, tokens, own, dict(zip(others, moved)), **more).grad
    assert found[own].any() and not found[~own].any()
    torch.testing.assert_close(again, found, rtol=0, atol=1e-12)
