"""Lightning OPD: the numbers and identities of its card; only where rollouts come from sets it
apart from OPD.
"""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.curricula import Cached
from opdkit.methods.method import load
from opdkit.testing import evaluate
from tests.methods.ragged import on, slopes
from tests.methods.toy import P_S, P_T, binary, close, expected, logits, numbers, tokens

TEACHER = (-0.5, -1.0, -2.0)
# the student at step 0, and after some steps
FIRST, LATER = (-0.8, -0.9, -2.5), (-0.6, -0.95, -2.2)


def at(student, **facts):
    return evaluate(
        load("lightning_opd"),
        binary(student),
        tokens(0, 0, 0),
        models={"teacher": binary(TEACHER)},
        **facts,
    )


@pytest.mark.parametrize(
    ("student", "credit"), [(FIRST, (0.3, -0.1, 0.5)), (LATER, (0.1, -0.05, 0.2))]
)
def test_the_credit_shrinks_on_the_same_row_as_the_student_arrives(student, credit):
    out = at(student)
    assert close(out.terms[0].credit, [credit])
    assert close(out.loss, -sum(credit) / 3)  # the ratio is 1
    slope = out.grad[0, :, 0] / (1 - binary(student).softmax(-1)[0, :, 0])
    assert close(slope, [-a / 3 for a in credit])  # the gradient of -A log pi_s


def test_a_credit_frozen_at_the_first_step_would_be_another_loss():
    frozen = evaluate(
        load("opd", clip=(0.2, 0.2)),
        binary(LATER),
        tokens(0, 0, 0),
        models={"teacher": binary(TEACHER)},
        before_logits=binary(FIRST),
    )
    ratios = (numbers(*LATER) - numbers(*FIRST)).exp()
    assert close(ratios, (1.221403, 0.951229, 1.349859))
    assert close(frozen.loss, (-0.36 + 0.095123 - 0.6) / 3) and close(frozen.loss, -0.288292)
    # clipped, not clipped
    assert (frozen.grad[0, [0, 2]] == 0).all() and (frozen.grad[0, 1] != 0).all()
    assert close(at(LATER).loss, -0.083333)


def test_within_a_step_of_several_updates_the_ratio_is_to_the_student_before_it():
    """Its credit is that of the step's start, whoever wrote the rows."""
    out = at(LATER, before_logits=binary(FIRST), sampler_logits=binary((-3.0, -0.1, -1.0)))
    assert close(out.terms[0].credit, [[0.3, -0.1, 0.5]]) and close(out.loss, -0.288292)


def test_on_average_over_what_the_writer_may_have_written_it_is_the_gradient_of_reverse_kl():
    assert close(expected(load("lightning_opd"), P_S, P_T), (0.346243, -0.220389, -0.125854))


def some(seed, vocabulary=11):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(3, 5, vocabulary, generator=g, dtype=torch.float64) for _ in range(2)
    )
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    return student, teacher, torch.randint(vocabulary, (3, 5), generator=g), mask


@pytest.mark.parametrize("denominator", ["rows", "tokens"])
def test_the_first_update_is_that_of_opd_on_the_same_rollouts_bit_for_bit(denominator):
    student, teacher, ids, mask = some(0)
    stored = evaluate(
        load("lightning_opd", denominator=denominator), student, ids, mask, {"teacher": teacher}
    )
    (term,) = load("opd").objective.terms
    online = evaluate(term.per(denominator), student, ids, mask, {"teacher": teacher})
    assert torch.equal(stored.grad, online.grad) and stored.loss == online.loss


def test_a_student_that_is_the_teacher_stays_whoever_wrote_the_rows():
    student, writer, ids, mask = some(1)
    for arguments in ({}, {"rollout_cap": 2.0}, {"clip": None}):
        out = evaluate(
            load("lightning_opd", **arguments),
            student,
            ids,
            mask,
            {"teacher": student},
            sampler_logits=writer,
        )
        assert (out.terms[0].credit == 0).all() and (out.grad == 0).all()


def test_shuffled_rows_have_the_same_gradients():
    student, teacher, ids, mask = some(2)
    order = torch.tensor([2, 0, 1])
    a = evaluate(load("lightning_opd"), student, ids, mask, {"teacher": teacher})
    b = evaluate(
        load("lightning_opd"), student[order], ids[order], mask[order], {"teacher": teacher[order]}
    )
    assert close(a.grad[order], b.grad, 12) and close(a.loss, b.loss.item(), 12)


@pytest.mark.parametrize(
    ("denominator", "of_long", "of_short"), [("rows", 1 / 8, 1 / 2), ("tokens", 1 / 5, 1 / 5)]
)
def test_a_token_counts_by_its_rollout_or_like_any_other(denominator, of_long, of_short):
    student = ((-1.0, -1.0, -1.0, -1.0), (-1.0,))
    out = on(
        load("lightning_opd", denominator=denominator),
        student,
        models={"teacher": ((0.5 - 1,) * 4, (0.5 - 1,))},
    )
    assert close(slopes(out, student), [-0.5 * of_long] * 4 + [-0.5 * of_short])


@pytest.mark.parametrize(("before", "weight"), [(-1.5, 0.606531), (-1.0, 1.0), (-0.5, 1.3)])
def test_the_weight_towards_the_writer_is_truncated(before, weight):
    out = evaluate(
        load("lightning_opd", rollout_cap=1.3),
        binary([before]),
        tokens(0),
        models={"teacher": binary([before + 0.2])},
        sampler_logits=binary([-1.0]),
    )
    assert close(out.terms[0].weight, [[weight]]) and close(out.loss, -0.2 * weight)
    plain = evaluate(
        load("lightning_opd"),
        binary([before]),
        tokens(0),
        models={"teacher": binary([before + 0.2])},
    )
    assert close(plain.loss, -0.2)  # without it the writer does not matter


def test_it_reads_neither_sampler_nor_vocabulary_and_takes_its_rollouts_from_a_cache():
    method = load("lightning_opd")
    assert method.curriculum == Cached()
    assert (
        str(method.needs)
        == "student log-prob of the sampled token, teacher log-prob of the sampled token"
    )
    assert "sampler" in load("lightning_opd", rollout_cap=2.0).needs.models


def test_composed_with_others_its_rollouts_stay_stored():
    assert (
        load("lightning_opd * iw_opd").curriculum
        == load("gkd + lightning_opd").curriculum
        == Cached()
    )
    with pytest.raises(UserError, match="each brings its own curriculum"):
        load("lightning_opd + tropd")
    with pytest.raises(UserError, match="not every response is the student's own"):
        load("lightning_opd * paced")


def test_an_unknown_denominator_is_explained():
    with pytest.raises(UserError, match="must be 'rows'"):
        load("lightning_opd", denominator="row_sums")


def test_a_row_that_was_cut_has_no_end_of_sequence_added():
    """Positions beyond the stored length do not exist: the sums run over what is there."""
    long = logits(P_S, P_S, P_S)
    short = long[:, :2]
    a = evaluate(
        load("lightning_opd"),
        long,
        tokens(0, 1, 2),
        torch.tensor([[True, True, False]]),
        {"teacher": logits(P_T, P_T, P_T)},
    )
    b = evaluate(load("lightning_opd"), short, tokens(0, 1), models={"teacher": logits(P_T, P_T)})
    assert (
        close(a.grad[:, :2], b.grad, 12)
        and (a.grad[:, 2] == 0).all()
        and close(a.loss, b.loss.item(), 12)
    )
